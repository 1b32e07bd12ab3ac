"""
MaskGen (arXiv 2501.07730), text to image: its transformer, and TA-TiTok, its tokenizer, whose
decoder reads the text too.

    cond = (words (B, 77, C), pooled (B, C), micro (B, 1), guide (B, 77, C))
    ids or probabilities -> embed (B, N, D) -> features (B, N, D) -> logits (B, N, V)
    ids or probabilities, guide -> TATiTok.decode -> images

In order: the parts that Meissonic is made of as well; `JointMDM`, the interface of `MDM` on them;
MaskGen; TA-TiTok; the published names and files.
"""
import contextlib
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.published import count_numbers, fill, read_published, seeded, shape_of
from model import Block, add_noise, expected_rows, is_embedding
from tokenizer import hash_of_weights, nearest_row

SIZES = {  # L and XL, by the word that stands for a file
    'random': dict(N=128, V=8192, D=1024, depth=16, n_head=16, T=77, C=768, micro=256),
    'random-xl': dict(N=128, V=8192, D=1280, depth=20, n_head=16, T=77, C=768, micro=256)}

TATITOK_SIZE = dict(image_size=256, patch=16, N=128, V=8192, code_dim=64, width=(768, 1024),
                    depth=(12, 24), n_head=(12, 16), T=77, C=768)


# -----------------------------------------------------------------------------
# Parts: modulation and attention

def sinusoid(v, n, period, cosine_first=False):
    """Numbers (B, m) -> (B, m, n): sines and cosines of v times frequencies from 1 to 1 / period.
    Meissonic's timesteps make angles of 1e6, where the last bit of a frequency counts: float32, and
    multiplied before divided, as published."""
    k = torch.arange(n // 2, device=v.device)
    frequencies = torch.exp(-math.log(period) * k / (n // 2))
    angle = v[..., None] * frequencies                         # (B, m, n / 2)
    if cosine_first:
        return torch.cat([angle.cos(), angle.sin()], -1)
    return torch.cat([angle.sin(), angle.cos()], -1)


def empty_table(rows, width):
    """nn.Embedding without its first random values, whose drawing on the meta device imports 70 MB of
    torch."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def adapt(x, shift, scale):
    """Adaptive layer norm: x (B, L, D), shift and scale (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rotate(x, rope):
    """Rotary positions (arXiv 2104.09864): neighbours (a, b) in x (B, H, L, d) become (a cos - b sin,
    b cos + a sin). rope (2, L, d): the cosines and sines, each of them twice."""
    cos, sin = rope
    a, b = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-b, a], -1).flatten(-2)
    return x * cos + turned * sin


def attend(q, k, v, rope=None):
    """Queries, keys, values (B, H, L, d) -> (B, L, H d)."""
    if rope is not None:
        q = rotate(q, rope)
        k = rotate(k, rope)
    with torch.autocast('cpu', enabled=False):
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return h.transpose(1, 2).flatten(2)


class RMSNorm(nn.RMSNorm):
    """In the precision of its weights, as autocast does it for a layer norm."""

    def __init__(self, D):
        super().__init__(D, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class QKV(nn.Module):
    """(B, L, D) -> queries, keys, values (B, H, L, D / H). With `qk_norm` the first two are
    normalised in each head."""

    def __init__(self, D, n_head, qk_norm):
        super().__init__()
        if D % n_head:
            raise ValueError(f'width D = {D} is not a multiple of n_head = {n_head}')
        self.n_head = n_head
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D)
        self.v = nn.Linear(D, D)
        self.norm_q = nn.Identity()
        self.norm_k = nn.Identity()
        if qk_norm:
            self.norm_q = RMSNorm(D // n_head)
            self.norm_k = RMSNorm(D // n_head)

    def forward(self, x):
        q = self.norm_q(self.heads(self.q(x)))
        k = self.norm_k(self.heads(self.k(x)))
        v = self.heads(self.v(x))
        return q, k, v

    def heads(self, x):
        if not x.is_cuda:
            x = x.to(self.q.weight.dtype)                      # a CPU's bf16 attention is slow
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class Stream(nn.Module):
    """Text or image in a joint block: what it brings to the attention, and the gated residuals after
    it. `ends`: the text in MaskGen's last block, of which only keys and values are used (its queries
    are published, and change nothing)."""

    def __init__(self, D, n_head, qk_norm, ends=False):
        super().__init__()
        self.ends = ends
        self.qkv = QKV(D, n_head, qk_norm)
        if ends:
            self.mod = nn.Linear(D, 2 * D)
        else:
            self.mod = nn.Linear(D, 6 * D)
            self.out = nn.Linear(D, D)
            self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU('tanh'), nn.Linear(4 * D, D))

    def enter(self, x, t):
        """x (B, L, D), t (B, D) -> queries, keys, values; the modulation that `leave` needs."""
        mod = self.mod(F.silu(t))[:, None]                     # (B, 1, 2 D or 6 D)
        if self.ends:
            scale, shift = mod.chunk(2, -1)                    # last norms name the scale first
            rest = None
        else:
            shift, scale, *rest = mod.chunk(6, -1)
        return self.qkv(adapt(x, shift, scale)), rest

    def leave(self, x, h, rest):
        """x and what the attention found for it, h, (B, L, D) each -> (B, L, D)."""
        if self.ends:
            return x
        gate, shift, scale, mlp_gate = rest
        x = x + gate * self.out(h)
        return x + mlp_gate * self.mlp(adapt(x, shift, scale))


class Joint(nn.Module):
    """MM-DiT block (arXiv 2403.03206): two streams with weights of their own, one attention over
    [text; image]. text (B, T, D), image (B, L, D), t (B, D), rope (2, T + L, d) or None -> text, image
    after it."""

    def __init__(self, D, n_head, qk_norm, text_ends=False):
        super().__init__()
        self.text = Stream(D, n_head, qk_norm, text_ends)
        self.image = Stream(D, n_head, qk_norm)

    def forward(self, text, image, t, rope):
        text_qkv, text_rest = self.text.enter(text, t)
        image_qkv, image_rest = self.image.enter(image, t)
        q, k, v = [torch.cat(pair, 2) for pair in zip(text_qkv, image_qkv)]
        h = attend(q, k, v, rope)                              # (B, T + L, D)
        T = text.shape[1]
        text = self.text.leave(text, h[:, :T], text_rest)
        image = self.image.leave(image, h[:, T:], image_rest)
        return text, image


# -----------------------------------------------------------------------------
# What the text-to-image transformers share

class JointMDM(nn.Module):
    """Masked diffusion transformer conditioned on text, with the interface of `MDM`. cond = (words
    (B, T, C), pooled (B, P), micro (B, n_micro), ...): the text as tokens and as one vector, numbers
    such as an aesthetic score; what follows is the decoder's. Networks of this class add: config,
    law, grid, n_micro, blocks, and the functions input_proj (rows of the table -> embeddings), enter
    (embeddings -> hidden states), text (words -> hidden states), modulation (cond -> t (B, D)),
    logits (hidden states, cond -> logits)."""

    def __init__(self, N, V, D, T, C, P):
        super().__init__()
        self.N, self.L, self.V, self.D, self.mask_id = N, N, V, D, V
        self.checkpointing = False                             # recompute blocks: less memory
        self.tok_emb = empty_table(V + 1, D)                   # codes, then the mask
        self.text_proj = nn.Linear(C, D)
        # The empty or negative prompt, which whoever has the text encoder fills in
        self.register_buffer('null_words', torch.zeros(1, T, C))
        self.register_buffer('null_pooled', torch.zeros(1, P))
        self.register_buffer('rope', None, persistent=False)   # rotary positions: none

    def init_weights(self):
        """Random weights to train from; wider ones than 0.02 where the network is narrow, which then
        learns in half the steps."""
        std = max(0.02, 0.35 / math.sqrt(self.D))
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=std)

    @property
    def table(self):
        """The codes as vectors, the mask last: (V + 1, D)."""
        return self.tok_emb.weight

    def embed(self, x, mask=None):
        """Ids (B, N), mask id allowed, or probabilities (B, N, V) -> embeddings (B, L, D), L = N, to
        which noise is added. Positions where mask (B, N) is True get the mask embedding.
        Probabilities give the soft embedding, a one-hot exactly the hard one. Raises ValueError."""
        return self.input_proj(expected_rows(x, self.table, self.N, mask))

    def features(self, emb, cond, layers):
        """Embeddings (B, L, D) -> hidden states of the image after the blocks in `layers`, counted
        from 1, in that order: (B, rows * columns, D) on `grid`, (B, L, D) without. For the
        discriminator heads and the output. Raises ValueError."""
        if not layers or min(layers) < 1 or max(layers) > len(self.blocks):
            raise ValueError(f'layers {layers}: expected some of the blocks 1 to {len(self.blocks)}')
        self.check(cond)
        dtype = self.table.dtype                               # not bf16: blocks add up
        t = self.modulation(cond)                              # (B, D)
        text = self.text(cond[0].to(dtype)).to(dtype)          # (B, T, D)
        image = self.enter(emb).to(dtype)
        states = []
        for block in self.blocks[:max(layers)]:
            if self.checkpointing and torch.is_grad_enabled():
                text, image = checkpoint(block, text, image, t, self.rope, use_reentrant=False)
            else:
                text, image = block(text, image, t, self.rope)
            states.append(image)
        return [states[k - 1] for k in layers]

    def check(self, cond):
        """Raise ValueError where the shapes of a condition are not this network's."""
        shapes = dict(words=self.null_words.shape[1:], pooled=self.null_pooled.shape[1:],
                      micro=(self.n_micro,))
        for (part, shape), found in zip(shapes.items(), cond):
            if found.shape[1:] != shape:
                raise ValueError(f'{part} of a condition for {type(self).__name__}: expected '
                                 f'{("B", *shape)}, got {tuple(found.shape)}')

    def forward(self, x, cond, sigma=0.0, rng=None):
        """Ids (B, N), probabilities (B, N, V) or embeddings (B, L, D) -> logits (B, N, V), without a
        mask entry. `sigma` mixes noise into the embeddings (`add_noise`), not into the condition."""
        emb = x if self.is_embedding(x) else self.embed(x)
        emb = add_noise(emb, sigma, rng)
        h = self.features(emb, cond, [len(self.blocks)])[0]
        return self.logits(h, cond)

    def is_embedding(self, x):
        return is_embedding(x, self)

    def pooled(self, cond):
        """The condition as one vector, for the discriminator heads: (B, P)."""
        return cond[1]

    def null(self, cond):
        """The unconditional condition of the same batch: other text, the rest stays."""
        words, pooled, *rest = cond
        null_words = self.null_words.expand_as(words).to(words.dtype)
        null_pooled = self.null_pooled.expand_as(pooled).to(pooled.dtype)
        return (null_words, null_pooled, *rest)


# -----------------------------------------------------------------------------
# MaskGen

class MaskGen(JointMDM):
    """MaskGen-VQ: N tokens in a row, joint blocks, an output tied to the table. micro (B, 1) is the
    aesthetic score, embedded as `micro` numbers."""

    law = 'maskgen'                                            # the sampler it was published with
    grid = None
    n_micro = 1

    def __init__(self, N, V, D, depth, n_head, T=77, C=768, micro=256):
        super().__init__(N, V, D, T, C, C)
        self.config = dict(N=N, V=V, D=D, depth=depth, n_head=n_head, T=T, C=C, micro=micro)
        self.input_proj = nn.Identity()
        self.pos_emb = nn.Parameter(torch.zeros(1, N, D))
        self.cond_proj = nn.Linear(C + micro, D)
        self.blocks = nn.ModuleList()
        for k in range(depth):
            self.blocks.append(Joint(D, n_head, qk_norm=False, text_ends=k == depth - 1))
        self.last_mod = nn.Linear(D, 2 * D)
        self.init_weights()

    def text(self, words):
        return self.text_proj(words)

    def enter(self, emb):
        return emb + self.pos_emb

    def modulation(self, cond):
        """Pooled text and score -> t (B, D); there is no timestep."""
        score = 100 * cond[2][:, 0].float()                    # bf16 counts to 256
        waves = sinusoid(score, self.config['micro'], period=1000)
        numbers = torch.cat([cond[1], waves], 1)               # (B, C + micro)
        return self.cond_proj(numbers.to(self.table.dtype))

    def logits(self, h, cond):
        """Hidden states (B, L, D) -> (B, N, V). The tied row V, the mask, is dropped."""
        mod = self.last_mod(F.silu(self.modulation(cond)))[:, None]
        scale, shift = mod.chunk(2, -1)
        return F.linear(adapt(h, shift, scale), self.table[:self.V])

    def embedding_parameters(self):
        """The table that Di[M]O keeps frozen; it is the output table too."""
        return [self.tok_emb.weight]


# -----------------------------------------------------------------------------
# TA-TiTok

class TATiTok(nn.Module):
    """Tokenizer of codes in a row, with the interface of `Tokenizer`: images (B, 3, H, H) in [-1, 1]
    <-> ids (B, N). The encoder reads [class, patches, N latents], the decoder [class, blank patches,
    N codes, text]; width, depth and n_head are pairs (encoder, decoder). `text` is a function
    captions -> guide (B, T, C), set by whoever has the text encoder."""

    def __init__(self, image_size, patch, N, V, code_dim, width, depth, n_head, T=77, C=768):
        super().__init__()
        self.config = dict(image_size=image_size, patch=patch, N=N, V=V, code_dim=code_dim,
                           width=tuple(width), depth=tuple(depth), n_head=tuple(n_head), T=T, C=C)
        if image_size % patch:
            raise ValueError(f'image_size {image_size} is not a multiple of the patch, {patch}')
        self.N, self.V, self.S, self.grid = N, V, 1, None
        self.text = None
        self.source = None
        self.autocast = contextlib.nullcontext()               # around the decoder, see `decoder_in`
        self.batch = max(1, min(256, 2 ** 21 // image_size ** 2))    # images that fit one pass
        self.side = image_size // patch                        # patches in a row
        patches = self.side ** 2
        enc, dec = width
        self.patch_proj = nn.Conv2d(3, enc, patch, patch)
        self.enc_class = nn.Parameter(torch.zeros(1, enc))
        self.enc_pos = nn.Parameter(torch.zeros(patches + 1, enc))
        self.latent_tokens = nn.Parameter(torch.zeros(N, enc))
        self.latent_pos = nn.Parameter(torch.zeros(N, enc))
        self.enc_norm = nn.LayerNorm(enc)
        self.encoder = make_trunk(enc, depth[0], n_head[0])
        self.to_code = nn.Sequential(nn.LayerNorm(enc), nn.Linear(enc, code_dim))
        self.codebook = empty_table(V, code_dim)
        self.from_code = nn.Linear(code_dim, dec)
        self.code_pos = nn.Parameter(torch.zeros(N, dec))
        self.dec_class = nn.Parameter(torch.zeros(1, dec))
        self.dec_blank = nn.Parameter(torch.zeros(1, dec))
        self.dec_pos = nn.Parameter(torch.zeros(patches + 1, dec))
        self.text_proj = nn.Linear(C, dec)
        self.text_pos = nn.Parameter(torch.zeros(T, dec))
        self.dec_norm = nn.LayerNorm(dec)
        self.decoder = make_trunk(dec, depth[1], n_head[1])
        self.to_pixels = nn.Sequential(nn.LayerNorm(dec), nn.Linear(dec, 3 * patch ** 2))
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.trunc_normal_(p, std=0.02)

    @property
    def table(self):
        """The codes as the decoder sees them: (V, code_dim)."""
        return self.codebook.weight

    def latents(self, images):
        """Images (B, 3, H, H) -> encoder outputs before quantisation (B, N, code_dim)."""
        B = len(images)
        x = self.patch_proj((images + 1) / 2)                  # the weights want [0, 1]
        x = x.flatten(2).transpose(1, 2)                       # (B, patches, enc), row by row
        x = torch.cat([self.enc_class.expand(B, 1, -1), x], 1) + self.enc_pos
        latents = (self.latent_tokens + self.latent_pos).expand(B, -1, -1)
        x = torch.cat([x, latents], 1)                         # (B, 1 + patches + N, enc)
        x = self.encoder(self.enc_norm(x))
        return self.to_code(x[:, -self.N:])

    def nearest(self, z):
        """z (..., code_dim) -> id of the nearest code (Euclidean), (...)."""
        return nearest_row(z, self.table)

    def encode(self, images):
        """Images (B, 3, H, H) in [-1, 1] -> ids (B, N). Raises ValueError for another size."""
        size = self.config['image_size']
        if images.shape[1:] != (3, size, size):
            raise ValueError(f'encode expects images (B, 3, {size}, {size}), got '
                             f'{tuple(images.shape)}')
        return self.nearest(self.latents(images))

    def decode(self, x, captions=None):
        """Ids (B, N), or float probabilities (B, N, V), -> images (B, 3, H, H), nominally in [-1, 1],
        not clamped. captions: B strings, or the guide (B, T, C) that `text` makes of them.
        Probabilities decode to the image of the *expected* code and are differentiable; a one-hot
        gives exactly the hard image. Raises ValueError for other shapes."""
        soft = x.is_floating_point()
        if x.shape[1:] != ((self.N, self.V) if soft else (self.N,)):
            raise ValueError(f'decode expects ids (B, {self.N}) or probabilities (B, {self.N}, '
                             f'{self.V}), got {tuple(x.shape)}')
        if soft:
            with torch.autocast(x.device.type, enabled=False):
                # E[e] = p @ codes, Soft-Di[M]O (arXiv 2509.22925) Eq. 3 with the decoder's table
                z = x.to(self.table.dtype) @ self.table
        else:
            z = F.embedding(x, self.table)
        return self.decode_latents(z, captions)

    def decode_latents(self, z, captions=None):
        """(B, N, code_dim), captions as in `decode` -> images (B, 3, H, H), not clamped."""
        B, side, patch = len(z), self.side, self.config['patch']
        guide = self.guide(captions, B).to(z.device, self.table.dtype)
        blank = torch.cat([self.dec_class, self.dec_blank.expand(side ** 2, -1)]) + self.dec_pos
        codes = self.from_code(z) + self.code_pos
        text = self.text_proj(guide) + self.text_pos
        h = torch.cat([blank.expand(B, -1, -1), codes, text], 1)     # (B, 1 + patches + N + T, dec)
        with self.autocast:
            h = self.decoder(self.dec_norm(h))
            h = self.to_pixels(h[:, 1:side ** 2 + 1])          # (B, patches, 3 patch^2)
        h = h.to(z.dtype)
        h = h.view(B, side, side, patch, patch, 3)             # rows, columns; inside a patch
        images = h.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, side * patch, side * patch)
        return self.smooth(images) * 2 - 1

    def decoder_in(self, dtype):
        """As of a `Tokenizer`: it decodes under autocast to `dtype`."""
        other = copy.copy(self)
        other._modules = dict(self._modules, encoder=None, decoder=copy.deepcopy(self.decoder))
        other.autocast = torch.autocast(self.table.device.type, dtype, enabled=dtype != torch.float32)
        return other

    def guide(self, captions, B):
        """Captions, or their guide itself -> guide (B, T, C). Raises ValueError."""
        if captions is None:
            raise ValueError('TA-TiTok decodes with the text: decode(x, captions) expects '
                             f'{B} captions or their guide')
        if not isinstance(captions, torch.Tensor):
            if self.text is None:
                raise ValueError('TA-TiTok got captions, but has no text encoder: set tokenizer.text, '
                                 'or give the guide, which is part of the condition')
            captions = self.text(captions)
        wanted = (B, self.config['T'], self.config['C'])
        if captions.shape != wanted:
            raise ValueError(f'TA-TiTok expects a guide {wanted}, got {tuple(captions.shape)}')
        return captions

    def digest(self):
        """What its tokens mean, in a word: hash of the weights."""
        return hash_of_weights(self.state_dict())

    def pack(self):
        """What a checkpoint stores: a small tokenizer itself, of a published one where it is."""
        return self.source or dict(args=self.config, net=self.state_dict())


def make_trunk(width, depth, n_head):
    """Blocks like MaskGIT's. Raises ValueError."""
    if width % n_head:
        raise ValueError(f'width {width} is not a multiple of n_head = {n_head}')
    trunk = nn.Sequential()
    for _ in range(depth):
        trunk.append(Block(width, n_head, 4 * width, post_norm=False, eps=1e-5))
    return trunk


# -----------------------------------------------------------------------------
# Published names

JOINT = [  # ours, theirs: a joint block in the names of diffusers
    ('text.mod.', 'norm1_context.linear.'),
    ('text.qkv.q.', 'attn.add_q_proj.'),
    ('text.qkv.k.', 'attn.add_k_proj.'),
    ('text.qkv.v.', 'attn.add_v_proj.'),
    ('text.qkv.norm_q.', 'attn.norm_added_q.'),                # Meissonic
    ('text.qkv.norm_k.', 'attn.norm_added_k.'),
    ('text.out.', 'attn.to_add_out.'),
    ('text.mlp.0.', 'ff_context.net.0.proj.'),
    ('text.mlp.2.', 'ff_context.net.2.'),
    ('image.mod.', 'norm1.linear.'),
    ('image.qkv.q.', 'attn.to_q.'),
    ('image.qkv.k.', 'attn.to_k.'),
    ('image.qkv.v.', 'attn.to_v.'),
    ('image.qkv.norm_q.', 'attn.norm_q.'),                     # Meissonic
    ('image.qkv.norm_k.', 'attn.norm_k.'),
    ('image.out.', 'attn.to_out.0.'),
    ('image.mlp.0.', 'ff.net.0.proj.'),
    ('image.mlp.2.', 'ff.net.2.')]

MASKGEN = [
    ('tok_emb.', 'embeddings.'),                               # codes, mask, 1001 unused rows
    ('pos_emb', 'pos_embed'),
    ('text_proj.', 'text_embed_proj.'),
    ('cond_proj.', 'cond_pooled_proj.'),
    ('last_mod.', 'norm.linear.')]

TRUNK = [  # a block of TA-TiTok
    ('norm1.', 'ln_1.'),
    ('qkv.', 'attn.in_proj_'),
    ('proj.', 'attn.out_proj.'),
    ('norm2.', 'ln_2.'),
    ('mlp.0.', 'mlp.c_fc.'),
    ('mlp.2.', 'mlp.c_proj.')]

TATITOK = [
    ('patch_proj.', 'encoder.patch_embed.'),
    ('enc_class', 'encoder.class_embedding'),
    ('enc_pos', 'encoder.positional_embedding'),
    ('latent_tokens', 'latent_tokens'),
    ('latent_pos', 'encoder.latent_token_positional_embedding'),
    ('enc_norm.', 'encoder.ln_pre.'),
    ('to_code.0.', 'encoder.ln_post.'),
    ('to_code.1.', 'encoder.conv_out.'),                       # a 1x1 convolution
    ('codebook.', 'quantize.embedding.'),
    ('from_code.', 'decoder.decoder_embed.'),
    ('code_pos', 'decoder.latent_token_positional_embedding'),
    ('dec_class', 'decoder.class_embedding'),
    ('dec_blank', 'decoder.mask_token'),
    ('dec_pos', 'decoder.positional_embedding'),
    ('text_proj.', 'decoder.text_guidance_proj.'),
    ('text_pos', 'decoder.text_guidance_positional_embedding'),
    ('dec_norm.', 'decoder.ln_pre.'),
    ('to_pixels.0.', 'decoder.ln_post.'),
    ('to_pixels.1.', 'decoder.ffn.0.'),                        # a 1x1 convolution
    ('smooth.', 'decoder.conv_out.')]


def block_names(rows, ours, theirs, count, first=0):
    """The table of one block -> that of `count` blocks, in our network counted from `first`."""
    names = []
    for k in range(count):
        for our_name, their_name in rows:
            names.append((f'{ours}.{first + k}.{our_name}', f'{theirs}.{k}.{their_name}'))
    return names


def published_name(key, names):
    """Our parameter name -> the published one, by {ours: theirs}, whole names or what stands before
    'weight' and 'bias'. A name that is not there is the same."""
    if key in names:
        return names[key]
    cut = key.rfind('.') + 1
    return names.get(key[:cut], key[:cut]) + key[cut:]


def maskgen_names(depth):
    return dict(MASKGEN + block_names(JOINT, 'blocks', 'blocks', depth))


def tatitok_names(depth):
    """depth: (encoder, decoder)."""
    encoder = block_names(TRUNK, 'encoder', 'encoder.transformer', depth[0])
    decoder = block_names(TRUNK, 'decoder', 'decoder.transformer', depth[1])
    return dict(TATITOK + encoder + decoder)


# -----------------------------------------------------------------------------
# Published files

def published_maskgen(path, n_head=None, V=None):
    """MaskGen from its file, its folder, or the dict that it holds; 'random' is L, 'random-xl' XL
    with random weights. Sizes are read off the shapes; n_head is the published 16 unless given. The
    table has rows for V codes, the mask, and K + 1 that are not used: V, unless given, is the power
    of two that leaves K = 1000, or else the largest that fits. ValueError, FileNotFoundError."""
    if path in ('random', 'random-xl'):
        return seeded(MaskGen, SIZES[path])
    weights, name = read_published(path, landmarks=('text_embed_proj.weight',))
    w = dict(weights)
    w.pop('lm_head.weight', None)                              # the table once more
    config = maskgen_config(w, name, n_head or SIZES['random']['n_head'], V)
    w['embeddings.weight'] = w['embeddings.weight'][:config['V'] + 1]
    w['null_words'] = torch.zeros(1, config['T'], config['C'])       # not in the file
    w['null_pooled'] = torch.zeros(1, config['C'])
    with torch.device('meta'):
        model = MaskGen(**config)
    names = maskgen_names(config['depth'])

    def rename(key):
        return published_name(key, names)
    return fill(model, w, rename, name)


def maskgen_config(w, name, n_head, V):
    """The sizes of a MaskGen file."""
    def size(key, *wanted):
        return shape_of(w, name, 'a maskgen transformer', key, *wanted)
    _, N, D = size('pos_embed', 1, 0, 0)
    C = size('text_embed_proj.weight', D, 0)[1]
    columns = size('cond_pooled_proj.weight', D, 0)[1]         # [pooled text; score]
    rows = size('embeddings.weight', 0, D)[0]
    if n_head < 1 or D % n_head:
        raise ValueError(f'{name}: width {D} does not fall into {n_head} heads (published: 16); '
                         'give n_head=... (--teacher_heads)')
    if columns < C + 2 or (columns - C) % 2:
        raise ValueError(f'{name}: cond_pooled_proj.weight has {columns} columns, expected the '
                         f'text width {C} and an even number for the score. Is this the right file?')
    if V is None:
        V = likely_codes(rows - 2, name)
    if not 0 < V < rows:
        raise ValueError(f'{name}: embeddings.weight has {rows} rows, expected V codes and a mask '
                         f'with V = {V}')
    depth = count_numbers(w, r'blocks\.(\d+)\.')
    return dict(N=N, V=V, D=D, depth=depth, n_head=n_head, T=SIZES['random']['T'], C=C,
                micro=columns - C)


def likely_codes(rest, name):
    """V where V codes and K unused rows are `rest` together, which is all that the file tells."""
    if rest - 1000 >= 128 and (rest - 1000).bit_count() == 1:  # K as published
        return rest - 1000
    V = 1 << max(1, rest).bit_length() - 1
    print(f'note: {name}: V = {V} codes is a guess, as the file tells only that {rest} rows are '
          'codes or unused; V=... settles it (a tokenizer given beside it does)')
    return V


def published_tatitok(path, n_head=None):
    """TA-TiTok from its file, its folder, or the dict that it holds; 'random' is the published size
    (BL128) with random weights. Sizes are read off the shapes; n_head is a pair (encoder, decoder),
    the published (12, 16) unless given. Raises ValueError, FileNotFoundError."""
    if path == 'random':
        return seeded(TATiTok, TATITOK_SIZE)
    weights, name = read_published(path, landmarks=('encoder.latent_token_positional_embedding',))
    w = dict(weights)
    w.pop('quantize.embed_prob', None)                         # of its training
    config = tatitok_config(w, name, n_head or TATITOK_SIZE['n_head'])
    for key in ('encoder.conv_out.weight', 'decoder.ffn.0.weight'):
        w[key] = w[key].flatten(1)                             # a 1x1 convolution as a matrix
    w['decoder.mask_token'] = w['decoder.mask_token'][0]
    with torch.device('meta'):
        tokenizer = TATiTok(**config)
    names = tatitok_names(config['depth'])

    def rename(key):
        return published_name(key, names)
    return fill(tokenizer, w, rename, name)


def tatitok_config(w, name, n_head):
    """The sizes of a TA-TiTok file."""
    def size(key, *wanted):
        return shape_of(w, name, 'a maskgen tokenizer', key, *wanted)
    N, enc = size('latent_tokens', 0, 0)
    patch = size('encoder.patch_embed.weight', enc, 3, 0, 0)[2]
    patches = size('encoder.positional_embedding', 0, enc)[0] - 1
    V, code_dim = size('quantize.embedding.weight', 0, 0)
    dec, C = size('decoder.text_guidance_proj.weight', 0, 0)
    T = size('decoder.text_guidance_positional_embedding', 0, dec)[0]
    size('encoder.conv_out.weight', code_dim, enc, 1, 1)
    size('decoder.ffn.0.weight', 3 * patch ** 2, dec, 1, 1)
    size('decoder.mask_token', 1, 1, dec)
    side = math.isqrt(patches)
    if side < 1 or side ** 2 != patches:
        raise ValueError(f'{name}: encoder.positional_embedding has {patches + 1} rows, expected '
                         'one and a square. Is this the right file?')
    fits = not isinstance(n_head, int) and len(n_head) == 2
    if not fits or min(n_head) < 1 or enc % n_head[0] or dec % n_head[1]:
        raise ValueError(f'{name}: encoder and decoder, {enc} and {dec} wide, do not fall into '
                         f'{n_head} heads (published: {TATITOK_SIZE["n_head"]}); give '
                         'n_head=(encoder, decoder)')
    depth = (count_numbers(w, r'encoder\.transformer\.(\d+)\.'),
             count_numbers(w, r'decoder\.transformer\.(\d+)\.'))
    return dict(image_size=side * patch, patch=patch, N=N, V=V, code_dim=code_dim, width=(enc, dec),
                depth=depth, n_head=n_head, T=T, C=C)
