"""
Tokens: the masked diffusion transformer, and every equation that the stages share.

    image -> ids (B, N) -> logits (B, N, V) -> soft embedding (B, L, D) -> loss

In order: the transformer with its soft-embedding input, and loaders of published weights; masking, token
initialisation, guidance; the multi-step teacher sampler and the one-step generator; the Di[M]O divergence; the
metrics; rewards; and, run as a script, the training of the small teacher. Simplified against MaskGIT: no dropout,
exact mask counts, loss on masked tokens only.

$ python model.py                               # shapes world, about 4 minutes on 2 CPU cores -> out/model.pt
$ python model.py --data=my_images              # your folder, with the tokenizer trained on it
$ torchrun --nproc_per_node=8 model.py --D=384 --depth=12 --n_head=6 --batch_size=512
Expected (shapes world): masked cross-entropy of 0.22 to 0.25 nats, and shapes that a person can name in out/model.png.
"""
import functools
import json
import math
import os
import re
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer import (HELD_OUT, TASKS, WORLDS, Images, Log, Stop, Tokenizer, apply_gradients, bit_rows, check,
                       check_finite, configure, end_processes, factors, fill, load_checkpoint, load_resumed,
                       parse_caption, progress, read_published, report_bench, restore, restore_optimizers, rng_for,
                       same_weights, save_checkpoint, save_grid, shape_of, split_batch, start_processes, timed,
                       token_data, word_ids, writing)

# -----------------------------------------------------------------------------
# I/O
data = 'shapes'        # 'shapes', 'shapes-open' (background left open: the stress test), or a folder of class folders
out_dir = 'out'        # tokenizer.pt is found here; model.pt, log, pictures and the token cache go here
n_images = 50_000      # training images of the shapes world, encoded once; a folder is used whole
flips = False          # also encode every image mirrored; MaskGIT and MaskBit True
resume = False         # continue from out_dir/model.pt to the same bits
seed = 0               # every random number of the run follows from it
log_every = 50         # steps between log lines
save_every = 500       # steps between checkpoints and pictures
# network
D = 96                 # width; MaskGIT 768
depth = 4              # blocks; MaskGIT 24
n_head = 3             # attention heads; MaskGIT 16
# training
steps = 1500           # updates
batch_size = 64        # images per update, all processes together; MaskGIT 256
micro_batch = 0        # images per forward pass on one device, 0 = as many as fit one pass; lower it to save memory
lr = 4e-3              # AdamW on tables, biases and norms, falls to zero along a cosine; MaskGIT 1e-4 on everything
muon_lr = 0.02         # Muon on the matrices of the trunk: a third of AdamW's steps here; 0 = AdamW only
weight_decay = 0.01    # on those matrices
schedule = 'arccos'    # law of the mask ratio: arccos or cosine
p_full = 0.15          # further share of images masked wholly: the student learns its modes there; MaskGIT 0
p_drop = 0.1           # share of captions replaced by the null condition, for guidance
ema_decay = 0.995      # averaged weights, which are the teacher
# system
compile = False        # torch.compile the network
bench = False          # time 20 steps and stop
# -----------------------------------------------------------------------------
# The transformer

class Block(nn.Module):
    """Attention and MLP with residuals, norms before (MaskGIT) or after (MaskBit): (B, L, D) -> (B, L, D)."""

    def __init__(self, D, n_head, mlp, post_norm, eps):
        super().__init__()
        self.n_head, self.post_norm = n_head, post_norm
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, mlp), nn.GELU(), nn.Linear(mlp, D))

    def attention(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x) if x.is_cuda else self.qkv(x).to(self.qkv.weight.dtype)  # a CPU's bf16 is slow here:
        with torch.autocast('cpu', enabled=False):                           # five times float32's time in backward
            q, k, v = qkv.view(B, L, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, L, D / H)
            h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, L, D))

    def forward(self, x):
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MDM(nn.Module):
    """Masked diffusion transformer over N tokens of V codes, conditioned on T appended words (a class is one word).

    The layout is MaskGIT's (Chang et al. 2022, PyTorch reproduction): tied output table and a bias per position. With
    `bits` it is MaskBit's: a code is `bits` numbers -1/+1, S tokens share one of the L = N / S positions, output table
    of its own, norms after. `cond` is int64 word ids (B, T), or labels (B,) where T = 1; id n_words means "no word",
    and a row of only that is the null condition. The mask id is V.
    """

    def __init__(self, N, V, D, depth, n_head, n_words, T=1, mlp=0, post_norm=False, eps=1e-5, bits=0, S=1):
        super().__init__()
        self.config = dict(N=N, V=V, D=D, depth=depth, n_head=n_head, n_words=n_words, T=T, mlp=mlp or 4 * D,
                           post_norm=post_norm, eps=eps, bits=bits, S=S)
        if D % n_head:
            raise ValueError(f'width D = {D} is not a multiple of n_head = {n_head}')
        self.N, self.L, self.V, self.D, self.mask_id, self.n_words = N, N // S, V, D, V, n_words
        self.law = 'maskbit' if bits else 'maskgit'                          # the sampler it was published with
        self.checkpointing = False                                           # recompute blocks in backward: less memory
        self.pos_emb = nn.Parameter(torch.zeros(1, self.L + T, D))
        if bits:
            self.register_buffer('codes', F.pad(bit_rows(bits), (0, 0, 0, 1)))  # (V + 1, bits), the mask is zeros
            self.input_proj, self.output = nn.Linear(S * bits, D), nn.Linear(D, S * V)
        else:
            self.tok_emb, self.input_proj = nn.Embedding(V + 1, D), nn.Identity()  # codes, then the mask
            self.bias = nn.Parameter(torch.zeros(N, V))
        self.cond_emb = nn.Embedding(n_words + 1, D)                         # words, then "no word"
        norm = lambda: nn.LayerNorm(D, eps=1e-12)
        more = [] if post_norm else [nn.Linear(D, D), nn.GELU(), norm(), nn.Linear(D, D)]
        self.first = nn.Sequential(norm(), *more)
        self.blocks = nn.ModuleList([Block(D, n_head, mlp or 4 * D, post_norm, eps) for _ in range(depth)])
        self.last = nn.Sequential(*([] if post_norm else [norm()]), nn.Linear(D, D), nn.GELU(), norm())
        for name, p in self.named_parameters():
            if p.dim() > 1 and name != 'bias':
                nn.init.trunc_normal_(p, std=0.02)

    @property
    def table(self):
        """The codes as vectors, the mask last: (V + 1, D), or (V + 1, bits) before `input_proj`."""
        return self.codes if self.config['bits'] else self.tok_emb.weight

    def embed(self, x, mask=None):
        """Ids (B, N), mask id allowed, or probabilities (B, N, V) -> token embeddings (B, L, D), before positions.
        Positions where mask (B, N) is True get the mask embedding. Probabilities give the soft embedding
        E[e] = sum_v p_v e_v (Soft-Di[M]O, arXiv 2509.22925, Eq. 3), for bits the projection of the expected bits; a
        one-hot gives exactly the hard one."""
        table = self.table
        if x.is_floating_point():
            if x.shape[1:] != (self.N, self.V):
                raise ValueError(f'embed expects probabilities (B, {self.N}, {self.V}), got {tuple(x.shape)}')
            with torch.autocast(x.device.type, enabled=False):               # exact for a one-hot in bf16 runs too
                emb = x.to(table.dtype) @ table[:self.V]                     # (B, N, bits or D)
        elif x.shape[1:] != (self.N,):
            raise ValueError(f'embed expects ids (B, {self.N}), got {tuple(x.shape)}')
        else:
            emb = F.embedding(x, table)                                      # (B, N, bits or D)
        if mask is not None:
            emb = torch.where(mask[..., None], table[self.V].to(emb.dtype), emb)
        return self.input_proj(emb.reshape(len(x), self.L, -1))              # S tokens side by side: (B, L, D)

    def features(self, emb, cond, layers):
        """Embeddings (B, L, D) -> hidden states (B, L, D) of the image positions after the blocks in `layers`, counted
        from 1, in that order. For the discriminator heads and the output. Raises ValueError."""
        if not layers or not all(1 <= k <= len(self.blocks) for k in layers):
            raise ValueError(f'layers {layers}: expected some of the blocks 1 to {len(self.blocks)}')
        words = self.cond_emb(cond.view(len(cond), -1))                      # (B, T, D)
        h = self.first(torch.cat([emb, words.to(emb.dtype)], 1) + self.pos_emb)
        h = h.to(self.pos_emb.dtype)                                         # (B, L + T, D), not bf16: blocks add up
        states = []
        for block in self.blocks[:max(layers)]:
            recompute = self.checkpointing and torch.is_grad_enabled()
            h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
            states.append(h[:, :self.L])                                     # views, no copies
        return [states[k - 1] for k in layers]

    def forward(self, x, cond, sigma=0.0, rng=None):
        """Ids (B, N), probabilities (B, N, V) or embeddings (B, L, D) -> logits (B, N, V), without a mask entry.
        `sigma` mixes noise into the token embeddings (`add_noise`), not into the condition."""
        emb = x if self.is_embedding(x) else self.embed(x)
        emb = add_noise(emb, sigma, rng)
        h = self.last(self.features(emb, cond, [len(self.blocks)])[0])
        if self.config['bits']:
            return self.output(h).view(len(h), self.N, self.V)
        return F.linear(h, self.tok_emb.weight[:self.V]) + self.bias         # the tied row V, the mask, is dropped

    def is_embedding(self, x):
        """Told from probabilities by the shape; where both have the same by what only probabilities do, sum to 1."""
        if not x.is_floating_point() or x.shape[1:] != (self.L, self.D):
            return False
        near = lambda: (x > -1e-2).all() and (x.sum(-1) - 1).abs().max() < 1e-2
        return (self.N, self.V) != (self.L, self.D) or not near()

    def null(self, cond):
        """The unconditional condition of the same batch."""
        return torch.full_like(cond, self.n_words)

    def embedding_parameters(self):
        """The tables that Di[M]O keeps frozen (MaskGIT's is the output table too)."""
        return [p for name, p in self.named_parameters() if name.startswith(('tok_emb', 'input_proj', 'cond_emb'))]

    @classmethod
    def from_pretrained(cls, kind, path, n_head=None, V=None):
        """Published weights, kind maskgit or maskbit, from their file, from its folder, or from the dict that it holds;
        path 'random' is the published size with random weights. All sizes but the heads are read off the shapes:
        n_head is the published 16 unless given. MaskGIT keeps V codes and K classes in one table; unless given, V is
        the power of two >= 128 that leaves K = 1000, or else the largest that fits. Errors: ValueError,
        FileNotFoundError, one line."""
        if kind not in PUBLISHED:
            raise ValueError(f'unknown kind {kind!r}; supported: {", ".join(PUBLISHED)}')
        if path == 'random':
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return cls(**PUBLISHED[kind]).eval()
        w, name = read_published(path)
        w = {re.sub('^token_emb', 'input_proj', k): v for k, v in w.items() if k != 'bits_to_indices'}
        size = lambda key, *wanted: shape_of(w, name, f'a {kind} transformer', key, *wanted)
        _, length, D = size('pos_emb', 1, 0, 0)
        L, depth = length - 1, len({k.split('.')[2] for k in w if k.startswith('transformer.layers.')})
        mlp = size(published_name('blocks.0.mlp.0.weight', kind), 0, D)[0]
        if kind == 'maskgit':
            rows = size('tok_emb.weight', 0, D)[0] - 2
            size('bias', length, rows + 2)
            imagenet, guess = rows - 1000 >= 128 and (rows - 1000).bit_count() == 1, V is None
            if guess:
                V = rows - 1000 if imagenet else 1 << max(1, rows - 1).bit_length() - 1
            if not 0 < V < rows:
                raise ValueError(f'{name}: tok_emb.weight has {rows + 2} rows, expected V + K + 2 with V = {V}')
            if guess and not imagenet:
                print(f'note: {name}: V = {V} codes, K = {rows - V} classes is a guess, as the file tells only V + K; '
                      'V=... settles it (a tokenizer given beside it does)')
            w['tok_emb.weight'], w['class_emb.weight'] = w['tok_emb.weight'].split([V + 1, rows + 1 - V])
            w['bias'] = w['bias'][:L, :V]                                    # no class position, no mask, no classes
            config = dict(N=L, V=V, n_words=rows - V)
        else:
            inputs, outputs = size('input_proj.weight', D, 0)[1], size('prediction_layer.weight', 0, D)[0]
            S = next((s for s in (2, 1, *range(3, inputs + 1)) if not inputs % s and s << inputs // s == outputs), 0)
            if not S:
                raise ValueError(f'{name}: prediction_layer.weight has {outputs} rows, expected S 2^k where '
                                 f'input_proj.weight has S k = {inputs} columns; are both of one release?')
            w['codes'] = F.pad(bit_rows(inputs // S), (0, 0, 0, 1))
            config = dict(N=L * S, V=outputs // S, n_words=size('class_emb.weight', 0, D)[0] - 1, bits=inputs // S, S=S)
        n_head = n_head or 16
        if n_head < 1 or D % n_head:
            raise ValueError(f'{name}: width {D} does not fall into {n_head} heads (published: 16); give n_head=...')
        keep = {k: PUBLISHED[kind][k] for k in ('post_norm', 'eps')}
        with torch.device('meta'):
            model = cls(**config, D=D, depth=depth, n_head=n_head, mlp=mlp, **keep)
        return fill(model, w, lambda key: published_name(key, kind), name)


def load_teacher(kind, path, tokenizer_path='', data='', n_head=0):
    """A teacher as the dict that model.pt holds (args, ema, words, data, prompts, tokenizer): kind 'ours' reads that
    file; maskgit and maskbit read published weights (n_head heads, 0: 16), whose words are the class numbers, or the
    names of the class folders if `data` is a folder (sorted, the published order). Exits with one line."""
    if kind == 'ours':
        return load_checkpoint(path, 'model', 'Train it with: python model.py', fallback=True)
    tokenizer_path = tokenizer_path or ('random' if path == 'random' else '')
    if not path or not tokenizer_path:
        raise SystemExit(f'--teacher={kind} needs --teacher_path=FILE and --tokenizer_path=FILE; README.md says where '
                         'to get them, and --teacher_path=random takes random weights of the published size')
    try:
        net = MDM.from_pretrained(kind, path, n_head)
        tokenizer = Tokenizer.from_pretrained(kind, tokenizer_path, math.isqrt(net.L), net.config['S'])
        if kind == 'maskgit' and net.n_words != 1000:                        # V was a guess: classes share its table
            net = MDM.from_pretrained(kind, path, n_head, tokenizer.V)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    if (net.N, net.V) != (tokenizer.N, tokenizer.V):
        raise SystemExit(f'{path} has {net.N} tokens of {net.V} codes, {tokenizer_path} {tokenizer.N} of '
                         f'{tokenizer.V}: they are not of one release')
    data = '' if data in WORLDS else data
    words = Images(data, tokenizer.config['image_size']).words if data else [str(k) for k in range(net.n_words)]
    if len(words) != net.n_words:
        raise SystemExit(f'--data={data} has {len(words)} class folders, {path} knows {net.n_words} classes')
    return dict(stage='model', step=0, config={}, args=net.config, ema=net.state_dict(), words=list(words), data=data,
                prompts=torch.arange(net.n_words)[:, None], tokenizer=tokenizer.pack())


PUBLISHED = {'maskgit': dict(N=256, V=1024, D=768, depth=24, n_head=16, n_words=1000, mlp=3072, post_norm=False,
                             eps=1e-5),
             'maskbit': dict(N=512, V=128, D=1024, depth=24, n_head=16, n_words=1000, mlp=4096, post_norm=True,
                             eps=1e-12, bits=7, S=2)}


def same_tokens(teacher, generator, teacher_path, path):
    """Exit unless both checkpoints speak of the same tokens: one tokenizer."""
    a, b = teacher['tokenizer'], generator['tokenizer']
    same = all(a.get(key) == b.get(key) for key in ('kind', 'args', 'digest'))
    if not same or any(not torch.equal(v, b['net'][k]) for k, v in a.get('net', {}).items()):
        raise SystemExit(f'{teacher_path} and {path} have different tokenizers, so their tokens do not mean the same; '
                         'give the teacher of that generator with --teacher_ckpt=...')


def published_name(key, kind):
    """Our parameter name -> the name in the published file."""
    fn = 'fn.' if kind == 'maskgit' else ''
    inner = {'norm1.': '0.norm.', 'norm2.': '1.norm.', 'qkv.': f'0.{fn}mha.in_proj_', 'proj.': f'0.{fn}mha.out_proj.',
             'mlp.0.': f'1.{fn}net.0.', 'mlp.2.': f'1.{fn}net.{3 if fn else 2}.'}
    key = re.sub(r'^blocks\.(\d+)\.(mlp\.\d\.|\w+\.)', lambda m: f'transformer.layers.{m[1]}.{inner[m[2]]}', key)
    place = {'0': '0', '1': '2', '3': '4', '4': '6'} if fn else {'0': '0', '2': '2'}   # MaskGIT counts its dropouts
    key = re.sub(r'^(first|last)\.(\d)', lambda m: f'{m[1]}_layer.{place[m[2]]}', key)
    return re.sub('^output', 'prediction_layer', re.sub('^cond_emb', 'class_emb', key))


# -----------------------------------------------------------------------------
# Random numbers, masking, token initialisation

def random_numbers(shape, rng, device, normal=False):
    """Uniform [0, 1) or normal numbers (B, ...). `rng` is None, one torch.Generator, or a list with one per image,
    which makes an image independent of the batch it is drawn in."""
    noise = torch.randn if normal else torch.rand
    if isinstance(rng, list):
        return torch.stack([noise(shape[1:], generator=g, device=g.device) for g in rng]).to(device)
    return noise(shape, generator=rng, device=device if rng is None else rng.device).to(device)


def categorical(probs, rng=None):
    """One draw per position from probs (B, N, V) by inverting the cumulative sum -> ids (B, N)."""
    total = probs.float().cumsum(-1)
    u = random_numbers(probs.shape[:2], rng, probs.device) * total[..., -1]
    return (total <= u[..., None]).sum(-1).clamp(max=probs.shape[-1] - 1)


def mask_ratio(u, schedule='arccos'):
    """u uniform in [0, 1] -> mask ratio t in [0, 1]: arccos(u) / (pi / 2) (MaskGIT) or cos(pi u / 2) (Meissonic)."""
    if schedule == 'arccos':
        return torch.arccos(u) / (math.pi / 2)
    if schedule == 'cosine':
        return torch.cos(math.pi / 2 * u)
    raise ValueError(f'unknown schedule {schedule!r}; expected arccos or cosine')


def random_positions(shape, count, rng, device):
    """bool (B, N) with exactly count (B, 1) True per row, at random positions."""
    order = random_numbers(shape, rng, device).argsort(1).argsort(1)         # a random permutation, (B, N)
    return order < count


def mask_tokens(tokens, ratio, rng=None):
    """Which of the tokens (B, N) to mask at ratio t (B,): bool (B, N), exactly max(1, round(t N)) True in each row.
    x_t = tokens.masked_fill(mask, mask_id)."""
    N, ratio = tokens.shape[1], torch.as_tensor(ratio, device=tokens.device)
    ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32))        # bf16 counts to 256
    count = (ratio * N).round().clamp(1, N).expand(len(tokens))
    return random_positions(tokens.shape[:2], count[:, None], rng, tokens.device)


def init_tokens(B, N, V, r_init, rng=None, device='cpu'):
    """Generator input x_init (B, N): uniformly random codes, exactly round(r_init N) random positions replaced by
    the mask id V (Di[M]O, arXiv 2503.15457, token initialisation)."""
    codes = (random_numbers((B, N), rng, device) * V).long().clamp(max=V - 1)
    return codes.masked_fill(random_positions((B, N), round(r_init * N), rng, device), V)


def add_noise(emb, sigma, rng=None):
    """sqrt(1 - sigma^2) e + sigma n for embeddings (B, L, D) (Di[M]O, arXiv 2503.15457, token initialisation)."""
    if sigma == 0:
        return emb
    n = random_numbers(emb.shape, rng, emb.device, normal=True)
    return math.sqrt(1 - sigma ** 2) * emb + sigma * n.to(emb.dtype)


def remask(tokens, mask_id, schedule, rng, p_full=0.0, p_near=0.0):
    """Forward process on tokens (B, N) -> x_t (B, N), mask (B, N) at ratios t ~ schedule (Di[M]O, arXiv 2503.15457,
    one-step generator). Ours: with probability p_full everything is masked, where only marginals are judged, and with
    p_near all but 1 to N / 8 tokens, which shows one object or choice and asks for the others."""
    u, kind = random_numbers((2, len(tokens)), rng, tokens.device)
    N = tokens.shape[1]
    t = mask_ratio(u, schedule).masked_fill(kind < p_near + p_full, 1.0)
    t = torch.where(kind < p_near, 1 - (u * N / 8).ceil() / N, t)
    mask = mask_tokens(tokens, t, rng)
    return tokens.masked_fill(mask, mask_id), mask


# Guidance and the samplers

def both(cond, null):
    """Two conditions, tensors or tuples of tensors, as one batch."""
    return tuple(map(both, cond, null)) if isinstance(cond, tuple) else torch.cat([cond, null])


def guided_logits(model, x, cond, cfg_scale):
    """u + s (c - u), both halves in one batch: x (B, N) -> logits (B, N, V). s = 1 needs no second half."""
    if cfg_scale == 1:
        return model(x, cond)
    logits = model(torch.cat([x, x]), both(cond, model.null(cond)))
    c, u = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)  # s would magnify bf16's rounding
    return torch.lerp(u, c, cfg_scale)


def reveal_counts(steps, N):
    """MaskGIT's arccos schedule: how many tokens each of the sampling steps reveals, at least 1, N in all."""
    if not 1 <= steps <= N:
        raise ValueError(f'steps must lie in 1..{N} (the number of tokens), got {steps}')
    v = torch.arccos(1 - torch.arange(steps) / (steps - 1)) / (math.pi / 2) if steps > 1 else torch.ones(1)
    counts = (v / v.sum() * N).round().clamp(min=1).long().tolist()
    counts[-1] += N - sum(counts)
    while counts[-1] < 1:                                                    # only with nearly as many steps as tokens
        counts[-1] += 1
        counts[counts.index(max(counts))] -= 1
    return counts


def filter_probs(probs, top_k=0, top_p=0.0):
    """Keep the top_k likeliest codes (0: all) and the smallest set of total probability >= top_p (0: all)."""
    if top_k:
        probs = probs * (probs >= probs.topk(min(top_k, probs.shape[-1])).values[..., -1:])
    if top_p:
        ordered, index = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        keep = before < top_p * ordered.sum(-1, keepdim=True)
        probs = probs * torch.zeros_like(probs).scatter(-1, index, keep.to(probs.dtype))
    return probs


def sampling_plan(steps, N, law='maskgit', power=3.0):
    """The published samplers in numbers per step: tokens to reveal, the share of guidance, the share of Gumbel noise.
    maskgit: `reveal_counts`, j / (n - 1), 1 - j / (n - 1). maskbit, with q = (j + 1) / n: floor(N arccos(q) / (pi / 2))
    stay masked (at least 1, fewer than before; none at the end), (1 - cos(pi (j / n)^power)) / 2, 1 - q."""
    counts, j = reveal_counts(steps, N), torch.arange(steps)                 # ratios in float32, as published
    if law == 'maskgit':
        ramp = j / max(1, steps - 1)
        return counts, ramp.tolist(), (1 - ramp).tolist()
    if law != 'maskbit':
        raise ValueError(f'unknown law {law!r} of the sampler; expected maskgit or maskbit')
    q, masked = (j + 1) / steps, [N]
    for wanted in (N * mask_ratio(q[:-1]).clamp(1e-6, 1)).floor().int().tolist():
        masked.append(min(max(1, wanted), masked[-1] - 1))
    counts = [before - after for before, after in zip(masked, masked[1:] + [0])]
    return counts, ((1 - torch.cos(math.pi * (j / steps) ** power)) / 2).tolist(), (1 - q).tolist()


def teacher_passes(model, steps, cfg_scale, law='', power=3.0):
    """Network passes of `sample_teacher`: guidance doubles the steps where it is not 1, as it is at the first."""
    shares = sampling_plan(steps, model.N, law or model.law, power)[1]
    return sum(1 + (1 + (cfg_scale - 1) * share != 1) for share in shares)


@torch.no_grad()
def sample_teacher(model, cond, steps, cfg_scale=1.5, gumbel=8.0, tau=1.0, rng=None, top_k=0, top_p=0.0, law='',
                   power=3.0):
    """MaskGIT's confidence sampler -> tokens (B, N). At each step of `sampling_plan`: guidance 1 + (s - 1) share; one
    draw per position from softmax(logits / tau); confidence log p + gumbel share g; the most confident are revealed
    and stay. `law` '' is the model's own. Published: MaskGIT 8 steps, cfg_scale 4, gumbel 4.5; MaskBit (14 bits) 64
    steps, cfg_scale 8.1, gumbel 7.8, power 3."""
    B, device = len(cond[0] if isinstance(cond, tuple) else cond), next(model.parameters()).device
    x = torch.full((B, model.N), model.mask_id, device=device)
    for count, guide, noisy in zip(*sampling_plan(steps, model.N, law or model.law, power)):
        logits = guided_logits(model, x, cond, 1 + (cfg_scale - 1) * guide).float() / tau
        probs = filter_probs(logits.softmax(-1), top_k, top_p)
        tokens = categorical(probs, rng)
        noise = -torch.log(-torch.log(random_numbers(x.shape, rng, x.device).clamp(1e-9, 1 - 1e-7)))
        confidence = probs.gather(-1, tokens[..., None])[..., 0].log() + gumbel * noisy * noise
        confidence[x != model.mask_id] = -torch.inf
        chosen = confidence.topk(count).indices
        x.scatter_(1, chosen, tokens.gather(1, chosen))
    return x


def one_step(generator, cond, r_init=0.6, sigma=0.1, tau=1.0, rng=None, top_k=0, top_p=0.0):
    """The whole one-step model: z = G(x_init, c), tokens ~ softmax(z / tau) -> logits (B, N, V), tokens (B, N).
    Gradients flow through the logits only (Di[M]O, arXiv 2503.15457, one-step generator)."""
    device = next(generator.parameters()).device
    B = len(cond[0] if isinstance(cond, tuple) else cond)
    x_init = init_tokens(B, generator.N, generator.V, r_init, rng, device)
    logits = generator(x_init, cond, sigma, rng)
    with torch.no_grad():
        tokens = categorical(filter_probs((logits.detach().float() / tau).softmax(-1), top_k, top_p), rng)
    return logits, tokens


def relaxed(logits, relax='soft', tau=1.0, rng=None):
    """A differentiable stand-in for the sampled tokens: logits (B, N, V) -> probabilities (B, N, V) for `MDM.embed`
    or `Tokenizer.decode`. soft: softmax(z / tau), the expectation (Soft-Di[M]O, arXiv 2509.22925); gumbel: hard
    Gumbel straight-through; st: a hard sample forward, the softmax backward."""
    z = logits.float() / tau
    if relax == 'gumbel':
        z = z - torch.log(-torch.log(random_numbers(z.shape, rng, z.device).clamp(1e-9, 1 - 1e-7)))
    probs = z.softmax(-1)                                                    # (B, N, V)
    if relax == 'soft':
        return probs
    if relax not in ('gumbel', 'st'):
        raise ValueError(f'unknown relaxation {relax!r}; expected soft, gumbel or st')
    ids = probs.argmax(-1) if relax == 'gumbel' else categorical(probs.detach(), rng)
    return F.one_hot(ids, z.shape[-1]) + (probs - probs.detach())            # the forward value is exactly one-hot


@torch.no_grad()
def relaxation_bias(f, probs, table, rng=None, samples=32):
    """What soft embeddings cost: |f(E[e]) - E[f(e)]| and its bound (Lip / 2) tr Cov(e) (Soft-Di[M]O, arXiv 2509.22925).
    f: embeddings (B, N, d) -> (B, ...); probs (B, N, V); table (V, d) -> bias, bound, tr Cov(e), each (B,).
    Lip, the Lipschitz constant of f's gradient, is the largest found on the segments from E[e] to `samples` draws."""
    mean = probs @ table                                                     # E[e], (B, N, d)
    trace = (probs @ table.square().sum(1) - mean.square().sum(-1)).sum(-1)  # tr Cov(e), (B,)
    at_mean, bias, lip, h = f(mean).flatten(1), 0, torch.zeros_like(trace), 1e-2
    for _ in range(samples):
        d = table[categorical(probs, rng)] - mean
        slope = (f(mean + h * d) - f(mean - h * d)).flatten(1) / (2 * h)     # J d, whose expectation is 0
        rest = f(mean + d).flatten(1) - at_mean - slope                      # Taylor's remainder, <= Lip / 2 |d|^2
        bias, lip = bias + rest / samples, torch.maximum(lip, 2 * rest.norm(dim=1) / d.square().sum((1, 2)))
    return bias.norm(dim=1), lip / 2 * trace, trace


# -----------------------------------------------------------------------------
# The Di[M]O divergence

def log_probs(logits):
    """log softmax over V in float32, or in float64 if that is what comes in."""
    return logits.double().log_softmax(-1) if logits.dtype == torch.float64 else logits.float().log_softmax(-1)


def jeffreys(teacher_logits, aux_logits, mask, beta):
    """Generalized Jeffreys divergence D = (1 - beta) KL(teacher || aux) + beta KL(aux || teacher), summed over masked
    positions: logits (B, N, V), mask (B, N) -> (B,). beta may be negative (Di[M]O, arXiv 2503.15457)."""
    log_p, log_q = log_probs(teacher_logits), log_probs(aux_logits)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)                        # KL(teacher || aux), (B, N)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)                        # KL(aux || teacher)
    return (((1 - beta) * forward + beta * reverse) * mask).sum(-1)


def dimo_grad(teacher_logits, aux_logits, mask, beta):
    """Gradient of `jeffreys` with respect to the auxiliary logits, in closed form: (B, N, V), zero where not masked.
    Forward part p_aux - p_teacher; reverse part p_aux (log p_aux - log p_teacher - KL(aux || teacher))."""
    log_p, log_q = log_probs(teacher_logits), log_probs(aux_logits)
    q, gap = log_q.exp(), log_q - log_p
    reverse = q * (gap - (q * gap).sum(-1, keepdim=True))
    return ((1 - beta) * (q - log_p.exp()) + beta * reverse) * mask[..., None]


def surrogate(logits, grad):
    """A loss whose gradient at the generator's logits z is `grad` / B; its *value* means nothing (log `jeffreys`).
    Summed over positions and codes, as in the released code."""
    return (logits.float() * grad.detach()).sum() / len(logits)


def aux_loss(aux_logits, tokens, mask, label_smoothing=0.0):
    """The auxiliary model learns to be the generator's own masked diffusion model: cross-entropy of its logits
    (B, N, V) on the generated tokens (B, N), at masked positions (Di[M]O, arXiv 2503.15457, auxiliary update)."""
    return F.cross_entropy(aux_logits[mask].float(), tokens[mask], label_smoothing=label_smoothing)


def token_entropy(logits):
    """Mean entropy in nats and mean largest probability of softmax(logits): how peaked the generator is."""
    log_p = log_probs(logits.detach())
    return -(log_p.exp() * log_p).sum(-1).mean(), log_p.max(-1).values.exp().mean()


# -----------------------------------------------------------------------------
# Optimizers, averaged weights

class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024: Nesterov momentum, its singular values pushed to about 1 by five
    Newton-Schulz steps) in float32 on a CPU: there torch's, always in bfloat16, takes 30 % of a distillation step."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in self.param_groups[0]['params']:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        group, shapes = self.param_groups[0], {}
        for p in (p for p in group['params'] if p.grad is not None):
            shapes.setdefault(p.shape, []).append(p)
        for (rows, columns), some in shapes.items():                         # equal shapes as one batch: few launches
            grads = [p.grad for p in some]
            averages = [self.state[p]['momentum_buffer'] for p in some]
            torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
            x = torch.stack(grads).lerp(torch.stack(averages), group['momentum'])
            x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
            x = x.mT if rows > columns else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            x = (x.mT if rows > columns else x).to(grads[0].dtype)
            torch._foreach_mul_(some, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(some, x.unbind(), alpha=-group['lr'] * max(1, rows / columns) ** 0.5)


def make_optimizers(network, muon_lr, lr, betas, weight_decay=0.0, momentum=0.95):
    """Muon for the matrices of trunk or heads, AdamW for the rest -> list of optimizers; muon_lr = 0 gives everything
    to AdamW, as the papers do. Each keeps its peak rate in optimizer.peak for `set_rate`."""
    trunk = [p for name, p in network.named_parameters()
             if muon_lr and p.requires_grad and p.dim() == 2 and name.startswith(('blocks', 'first', 'last', 'heads'))]
    rest = [p for p in network.parameters() if p.requires_grad and all(p is not q for q in trunk)]
    adam = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0 if muon_lr else weight_decay,
                             fused=rest[0].is_cuda)
    optimizers = [adam] + ([Muon(trunk, muon_lr, weight_decay, momentum)] if trunk else [])
    for optimizer in optimizers:
        optimizer.peak = optimizer.param_groups[0]['lr']                     # not saved: a resumed run takes the flag's
    return optimizers


def set_rate(optimizers, factor):
    for optimizer in optimizers:
        optimizer.param_groups[0]['lr'] = optimizer.peak * factor


def compile_blocks(*networks, twice=False):
    """torch.compile block by block: equal blocks share one compilation. `twice`: backward passes a graph again."""
    import torch._dynamo
    import torch._functorch.config
    torch._dynamo.config.recompile_limit = 32                                # with or without gradient, other batches
    torch._functorch.config.donated_buffer = not twice
    for block in (block for network in networks for block in network.blocks):
        block.compile()


def ema_update(average, network, decay, step):
    """average <- d average + (1 - d) network, with d = min(decay, (1 + step) / (10 + step))."""
    d = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - d)


# -----------------------------------------------------------------------------
# Metrics (a toy feature space: never comparable with Inception's FID)

def toy_features(images):
    """Images (B, 3, H, W) in [-1, 1] -> (B, 64) float64: two random convolutions, ReLU, 4x4 average pooling, a random
    projection. Fixed by NumPy's frozen generator; it reacts to colour, place, size, shape and background."""
    draw_weights = np.random.RandomState(0).standard_normal
    w = lambda gain, *shape: torch.from_numpy(draw_weights(shape)).float() * gain / math.prod(shape[1:]) ** 0.5
    w1, b1, w2, b2, project = w(1.4, 32, 3, 5, 5), w(0.3, 32), w(1.4, 64, 32, 3, 3), w(0.3, 64), w(10, 64, 64 * 16)
    rows = []
    for x in images.float().cpu().clamp(-1, 1).split(500):
        x = F.adaptive_avg_pool2d(x, 32)                                     # 32 x 32 images stay what they are
        h = F.relu(F.conv2d(x, w1, b1, stride=2, padding=2))                 # (B, 32, 16, 16)
        h = F.relu(F.conv2d(h, w2, b2, stride=2, padding=1))                 # (B, 64, 8, 8)
        rows.append(F.adaptive_avg_pool2d(h, 4).flatten(1) @ project.T)
    return torch.cat(rows).double()


def frechet_distance(x, y):
    """Frechet distance of two Gaussians, float64 (Heusel et al. 2017), each given by features (M, d) or by a tuple of
    mean and covariance: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The last trace is the sum of the singular values
    of S1^(1/2) S2^(1/2), which stays exact where a covariance has no full rank."""
    fit = lambda z: (z.double().mean(0), torch.cov(z.double().T).reshape(z.shape[1], -1))
    (m1, s1), (m2, s2) = ([torch.as_tensor(v).double() for v in z] if isinstance(z, tuple) else fit(z) for z in (x, y))
    values, vectors = torch.linalg.eigh(torch.stack([s1, s2]))
    root1, root2 = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    cross = torch.linalg.svdvals(root1 @ root2).sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def precision_recall(real, fake, k=3):
    """Share of fakes inside some ball around a real point, whose radius is the distance to its k-th other neighbour,
    and the roles swapped (Kynkaanniemi et al. 2019): features (M, d), (N, d) -> two floats."""
    real, fake = real.double(), fake.double()                               # cdist cancels in float32

    def covered(centres, points):
        radius = torch.cat([torch.cdist(c, centres).kthvalue(k + 1).values for c in centres.split(1000)])
        inside = [(torch.cdist(p, centres) < radius).any(1) for p in points.split(1000)]
        return float(torch.cat(inside).double().mean())
    return covered(real, fake), covered(fake, real)


class Reference:
    """What the metrics compare with: held-out renders of the shapes world, or a random half of the folder (which the
    models were trained on too)."""

    def __init__(self, source, n=5000):
        self.source = source
        if source.is_world:
            index, self.rest = np.arange(HELD_OUT, HELD_OUT + n), np.arange(HELD_OUT + n, HELD_OUT + 20 * n)
            self.name = f'{n} held-out renders'
        else:
            order = np.random.RandomState(0).permutation(source.length)
            index, self.rest = order[::2][:n], order[1::2]
            self.name = f'{len(index)} images of {source.data} (real images: {len(self.rest)} others)'
        features, self.captions = [], []
        for part in np.array_split(index, -(-len(index) // 500)):            # 5,000 ImageNet images would be 4 GB
            images, captions = source.batch(part)
            features.append(toy_features(images))
            self.captions += captions
        self.features = torch.cat(features)

    def prompts(self, n):
        """n captions with their real images (n, 3, H, W), none of them in the reference."""
        images, captions = self.source.batch(np.resize(self.rest, n))
        return captions, images

    def measure(self, images, captions):
        """Images (n, 3, H, W) drawn for the captions -> dict: toy_fd, precision, recall, accuracy (the checker's
        verdict; for a folder a 5-nearest-neighbour vote of the reference), and per task and factor where known."""
        x = toy_features(images)
        precision, recall = precision_recall(self.features, x)
        row = dict(toy_fd=frechet_distance(x, self.features), precision=precision, recall=recall)
        if self.source.is_world:
            right, tasks = check(images, captions), np.array([parse_caption(c)[0] for c in captions])
            row['tasks'] = {t: float(right[tasks == t].mean()) for t in TASKS if (tasks == t).any()}
            row['tv'] = factors(images, captions, self.source.data)
        else:
            label = torch.tensor([self.source.words.index(c) for c in self.captions])
            nearest = torch.cdist(x, self.features).topk(min(5, len(label)), largest=False).indices
            votes = label[nearest].mode(1).values
            right = np.array([self.source.words[v] == c for v, c in zip(votes.tolist(), captions)])
        return dict(row, accuracy=float(right.mean()), n=len(captions), reference=self.name)


def show_table(entries):
    """Print rows of measurements with sample count and reference, then what else they hold: rewards and tasks."""
    factor, name = list(entries[0].get('tv', {})), lambda e: f'{e["name"]:26s}'
    print(f'\n{"":26s}passes  ms/image  toy FD  precision  recall  followed'
          + ''.join(f'{f"TV {x}":>15s}' for x in factor))
    for e in entries:
        print(f'{name(e)}{e["passes"]:6d}{e["ms"]:10.2f}{e["toy_fd"]:8.2f}{e["precision"]:11.3f}{e["recall"]:8.3f}'
              f'{e["accuracy"]:10.3f}' + ''.join(f'{e["tv"][x]:15.3f}' for x in factor))
    print(f'{entries[0]["n"]} images per row, toy FD, precision and recall (k = 3) against {entries[0]["reference"]}'
          + '; TV: total-variation distance of what the captions leave open from its known law' * bool(factor))
    rows = [{**{k: e[k] for k in ('reward', 'held_out', 'clipped', 'saturation') if k in e}, **e.get('tasks', {})}
            for e in entries]
    if not rows[0]:
        return
    print('\n' + ' ' * 26 + ''.join(f'{k:>15s}' for k in rows[0]))
    for e, row in zip(entries, rows):
        print(name(e) + ''.join(f'{v:15.3f}' for v in row.values()))


def image_rngs(seed, index, device='cpu'):
    """One random generator per image: the same image whatever the batch."""
    return [rng_for(seed, int(i), 'image', device) for i in index]


@torch.no_grad()
def render(sample, tokenizer, cond, seed, batch=250):
    """Images (n, 3, H, W) on the CPU and milliseconds per image, from sample(cond, rng) -> tokens, in batches."""
    device, images, start = next(tokenizer.parameters()).device, [], time.time()
    for k in range(0, len(cond), batch):
        part = cond[k:k + batch].to(device)
        tokens = sample(part, image_rngs(seed, range(k, k + len(part)), device))
        images += [tokenizer.decode(t).float().cpu() for t in tokens.split(tokenizer.batch)]  # waits for the device
    return torch.cat(images), (time.time() - start) * 1000 / len(cond)


def final_table(path, samplers, tokenizer, reference, conditions, n, seed, config):
    """Measure n real images, their reconstruction and every sampler {name: (passes, sample(cond, rng) -> tokens)};
    print the table and write path.json and path.png (16 images per row, the same captions in each column)."""
    captions, real = reference.prompts(n)
    device = next(tokenizer.parameters()).device
    rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(x.to(device))).cpu() for x in real.split(tokenizer.batch)])
    entries, pictures = [], [real[:16]]
    for name, images in (('real images', real), ('tokenizer reconstruction', rebuilt)):
        entries.append(dict(name=name, passes=0, ms=0.0, **reference.measure(images, captions)))
    for name, (passes, sample) in samplers.items():
        drawn, ms = render(sample, tokenizer, conditions(captions), seed)
        entries.append(dict(name=name, passes=passes, ms=round(ms, 2), **reference.measure(drawn, captions)))
        pictures.append(drawn[:16])
    show_table(entries)
    save_grid(f'{path}.png', torch.cat(pictures), captions[:16] * len(pictures), columns=len(pictures[0]))
    with writing(f'{path}.json'), open(f'{path}.json', 'w') as file:
        json.dump(dict(config=config, rows=entries), file, indent=1)
    print(f'image seeds ({seed}, 0..{n - 1}); table: {path}.json, picture: {path}.png, samples: python sample.py '
          f'--ckpt {path}.pt')


# -----------------------------------------------------------------------------
# Rewards: functions (images (B, 3, H, W) in [-1, 1], prompts) -> (B,), differentiable in the images

def cached(features):
    """Remember the text features (1, ...) = features([prompt]) of every prompt: prompts -> (B, ...). One at a time, as
    the last bits of a matrix product depend on its batch, and a resumed run meets the prompts in another order."""
    known = functools.cache(torch.no_grad()(lambda prompt: features([prompt])[0]))
    return lambda prompts: torch.stack([known(p) for p in prompts])


def reward_sum(rewards, images, prompts):
    """sum_i w_i R_i for rewards {name: (w_i, R_i)}: images (B, 3, H, W), prompts -> (B,)."""
    return sum(weight * reward(images, prompts) for weight, reward in rewards.values())


def load_rewards(settings, world_file, device):
    """The rewards whose weight is not zero: {name: (weight, function)}. Nothing is loaded for the others."""
    path = lambda name: settings[f'{name}_path']
    makers = dict(clip=lambda: world_reward(world_file, 'clip', device),
                  clipscore=lambda: clip_reward('clipscore', path('clip'), path('clip'), device),
                  hps=lambda: clip_reward('hps', path('hps'), path('clip'), device),
                  pick=lambda: clip_reward('pick', path('pick'), path('clip'), device),
                  imagereward=lambda: image_reward(path('imagereward'), path('bert'), device))
    return {name: (settings[f'w_{name}'], make()) for name, make in makers.items() if settings[f'w_{name}']}


# Published rewards (optional extra: transformers, for its networks and its two word tokenizers)

def pixels_224(images):
    """CLIP's preprocessing made differentiable: images (B, 3, H, W) in [-1, 1] -> (B, 3, 224, 224). In float32: shorter
    side to 224 by an antialiased bicubic (PIL's), centre crop, CLIP's mean and std; clamped twice, as bicubic
    overshoots."""
    x = (images.float() / 2 + 0.5).clamp(0, 1)
    size = [224 * s // min(x.shape[2:]) for s in x.shape[2:]]
    x = F.interpolate(x, size=size, mode='bicubic', antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).to(x)
    return (x[:, :, top:top + 224, left:left + 224] - mean[:, None, None]) / std[:, None, None]


def hub(build, path):
    """build(transformers); a missing package, a missing or wrong file ends with one line. Only tensors are read."""
    try:
        import transformers
    except ImportError:
        raise SystemExit('published rewards need one more package: pip install transformers') from None
    try:
        return build(transformers)
    except Exception as error:  # transformers raises many kinds here
        reason = f'it has no {error}' if isinstance(error, KeyError) else (str(error) or 'empty').splitlines()[0]
        raise SystemExit(f'cannot load a published reward from {path}: {reason}; say where its files are with '
                         '--clip_path, --hps_path, --pick_path, --imagereward_path, --bert_path') from None


def from_open_clip(state):
    """Names of an open_clip checkpoint -> transformers.CLIPModel: queries, keys and values are one matrix there, both
    projections are transposed."""
    names = (('visual.conv1', 'vision_model.embeddings.patch_embedding'), ('ln_1', 'layer_norm1'),
             ('visual.class_embedding', 'vision_model.embeddings.class_embedding'), ('ln_2', 'layer_norm2'),
             ('visual.ln_pre', 'vision_model.pre_layrnorm'), ('visual.', 'vision_model.'), ('mlp.c_fc', 'mlp.fc1'),
             ('ln_post', 'post_layernorm'), ('token_embedding', 'text_model.embeddings.token_embedding'),
             ('ln_final', 'text_model.final_layer_norm'), ('transformer.resblocks', 'encoder.layers'),
             ('positional_embedding', 'embeddings.position_embedding.weight'), ('mlp.c_proj', 'mlp.fc2'),
             ('attn.', 'self_attn.'))
    out = {'visual_projection.weight': state['visual.proj'].T, 'text_projection.weight': state['text_projection'].T}
    for key, value in state.items():
        key = functools.reduce(lambda k, name: k.replace(*name), names, key)
        if key.startswith(('encoder.', 'embeddings.')):
            key = f'text_model.{key}'
        if '.in_proj_' in key:
            out.update({key.replace('in_proj_', f'{p}_proj.'): part for p, part in zip('qkv', value.chunk(3))})
        elif key not in ('vision_model.proj', 'text_projection'):
            out[key] = value
    return out


def clip_reward(kind, path, clip_path, device):
    """CLIP ViT-H/14 in three sets of weights, f and g unit vectors: CLIP score 100 f.g, HPSv2.1 f.g (arXiv 2306.09341),
    PickScore exp(logit_scale) f.g (arXiv 2305.01569)."""
    def build(t):
        if kind == 'hps':
            model = t.CLIPModel(t.CLIPConfig.from_pretrained(clip_path))
            restore(model, from_open_clip(read_published(path)[0]), path, 'HPSv2.1')
        else:
            model, report = t.CLIPModel.from_pretrained(path, use_safetensors=True, output_loading_info=True)
            for key in report['missing_keys']:                               # would stay random
                raise KeyError(key)
        return model.float().to(device).eval().requires_grad_(False), t.AutoTokenizer.from_pretrained(clip_path)

    model, words = hub(build, path)
    unit = lambda out: F.normalize(getattr(out, 'pooler_output', out), dim=-1)  # transformers >= 5 wraps the features
    ids = lambda prompts: words(prompts, padding='max_length', truncation=True, return_tensors='pt',
                                max_length=model.config.text_config.max_position_embeddings)['input_ids'].to(device)
    text = cached(lambda prompts: unit(model.get_text_features(input_ids=ids(prompts))))
    scale = {'clipscore': 100.0, 'hps': 1.0, 'pick': model.logit_scale.exp().item()}[kind]
    return lambda images, prompts: scale * (
        unit(model.get_image_features(pixel_values=pixels_224(images))) * text(prompts)).sum(-1)


def from_imagereward(state):
    """Names of ImageReward.pt -> {visual: BlipVisionModel, text: BlipTextModel, mlp: layers}; its two projections and
    position buffer are not used."""
    rules = (('blip.visual_encoder', 'visual'), ('blip.text_encoder', 'text'), ('mlp.layers', 'mlp'),
             ('visual.cls_token', 'visual.embeddings.class_embedding'), ('visual.norm', 'visual.post_layernorm'),
             ('visual.pos_embed', 'visual.embeddings.position_embedding'), ('visual.blocks', 'visual.encoder.layers'),
             ('visual.patch_embed.proj', 'visual.embeddings.patch_embedding'), ('.attn.qkv', '.self_attn.qkv'),
             ('.attn.proj', '.self_attn.projection'), ('.norm1', '.layer_norm1'), ('.norm2', '.layer_norm2'))
    unused = ('blip.vision_proj', 'blip.text_proj', 'blip.text_encoder.embeddings.position_ids')
    return {functools.reduce(lambda k, rule: k.replace(*rule), rules, key): value for key, value in state.items()
            if not key.startswith(unused)}


def image_reward(path, bert_path, device):
    """ImageReward (arXiv 2304.05977): BERT whose words look at BLIP's image tokens, and a linear map of its first state
    (five layers without activations). Sizes are read off the shapes. Words and pixels meet in every layer, so there are
    no text features to remember."""
    def build(t):
        state = from_imagereward(read_published(path)[0])
        size = lambda key, axis=0: state[key].shape[axis]
        depth = lambda prefix: 1 + max(int(k[len(prefix):].split('.')[0]) for k in state if k.startswith(prefix))
        width, layers = size('visual.post_layernorm.weight'), ('visual.encoder.layers.', 'text.encoder.layer.')
        eyes = t.BlipVisionModel(t.BlipVisionConfig(
            hidden_size=width, intermediate_size=size(f'{layers[0]}0.mlp.fc1.weight'), image_size=224,
            patch_size=size('visual.embeddings.patch_embedding.weight', 2), num_hidden_layers=depth(layers[0]),
            num_attention_heads=16, layer_norm_eps=1e-6, hidden_act='gelu'))
        text = t.BlipTextModel(t.BlipTextConfig(
            vocab_size=size('text.embeddings.word_embeddings.weight'), num_attention_heads=12, layer_norm_eps=1e-12,
            hidden_size=size('text.embeddings.LayerNorm.weight'), encoder_hidden_size=width,
            intermediate_size=size(f'{layers[1]}0.intermediate.dense.weight'), num_hidden_layers=depth(layers[1]),
            max_position_embeddings=size('text.embeddings.position_embeddings.weight')), add_pooling_layer=False)
        mlp = nn.Sequential(*(nn.Linear(size(f'mlp.{k}.weight', 1), size(f'mlp.{k}.weight')) if k in '02467'
                              else nn.Identity() for k in '01234567'))       # dropout at 1, 3 and 5
        net = nn.ModuleDict(dict(visual=eyes, text=text, mlp=mlp))
        restore(net, state, path, 'ImageReward')
        return net.float().to(device).eval().requires_grad_(False), t.AutoTokenizer.from_pretrained(bert_path)

    net, words = hub(build, path)
    def score(images, prompts):
        seen = net.visual(pixel_values=pixels_224(images)).last_hidden_state  # (B, 197, width)
        x = words(prompts, padding='max_length', truncation=True, max_length=35, return_tensors='pt').to(device)
        h = net.text(x['input_ids'], attention_mask=x['attention_mask'], encoder_hidden_states=seen, is_decoder=False)
        return (net.mlp(h.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    return score


# The rewards of the small world; reward.py trains them

def conv_tower(d):
    """Images (B, 3, 32, 32) -> (B, d), four convolutions: the reward that is optimised."""
    conv = lambda a, b, size, stride: nn.Sequential(nn.Conv2d(a, b, size, stride, size // 2), nn.GroupNorm(8, b),
                                                    nn.SiLU())
    return nn.Sequential(conv(3, 32, 5, 2), conv(32, 64, 3, 2), conv(64, 64, 3, 1), conv(64, 128, 3, 2), nn.Flatten(),
                         nn.Linear(128 * 4 * 4, d))


class PatchTower(nn.Module):
    """Images (B, 3, 32, 32) -> (B, d), a small vision transformer: the reward that is only reported."""

    def __init__(self, d):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, 64))
        self.blocks = nn.Sequential(*[Block(64, 2, 128, False, 1e-5) for _ in range(2)])
        self.out = nn.Linear(64 * 64, d)

    def forward(self, x):
        return self.out(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.place).flatten(1))


class TwoTower(nn.Module):
    """CLIP in miniature: log-odds that a caption is true of an image = scale cos(f, g) + shift, with f from pixels
    and g from the caption's words in order."""

    def __init__(self, kind, n_words, T, d=256):
        super().__init__()
        self.config = dict(kind=kind, n_words=n_words, T=T, d=d)
        self.image = conv_tower(d) if kind == 'conv' else PatchTower(d)
        self.words = nn.Embedding(n_words + 1, 32)
        self.text = nn.Sequential(nn.Flatten(), nn.Linear(32 * T, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.log_scale, self.shift = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-8.0))

    def image_features(self, x):
        return F.normalize(self.image(F.adaptive_avg_pool2d(x, 32)), dim=-1)  # (B, d)

    def text_features(self, ids):
        return F.normalize(self.text(self.words(ids)), dim=-1)               # (B, T) -> (B, d)

    def score(self, f, g):
        return self.log_scale.exp() * (f * g).sum(-1) + self.shift


def world_reward(path, name, device):
    """R = log P(caption is true of the image), at most 0: an image that already follows its prompt pulls little."""
    state = load_checkpoint(path, 'rewards', 'Make it with: python reward.py', fallback=True)
    net = TwoTower(**state['args'][name]).to(device).eval().requires_grad_(False)
    restore(net, state[name], path, name)
    text = cached(lambda prompts: net.text_features(word_ids(prompts, state['words'], net.config['T']).to(device)))
    return lambda images, prompts: F.logsigmoid(net.score(net.image_features(images.clamp(-1, 1)), text(prompts)))


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals())
    rank, world, device, autocast = start_processes()
    micro, accumulate = split_batch(batch_size, micro_batch, world)
    out, tokenizer_path = os.path.join(out_dir, 'model.pt'), os.path.join(out_dir, 'tokenizer.pt')
    packed = load_checkpoint(tokenizer_path, 'tokenizer', 'Train it with: python tokenizer.py', fallback=True)
    tokenizer = Tokenizer.from_checkpoint(packed).to(device)
    images = Images(data, tokenizer.config['image_size'], n_images)
    if packed['config']['data'] != data and rank == 0:
        print(f'note: {tokenizer_path} was trained on {packed["config"]["data"]}, not on {data}')
    dataset = token_data(images, tokenizer, out_dir, device, flips=flips)  # (M, N + T)
    N, words, T = tokenizer.N, list(images.words), images.caption_length

    torch.manual_seed(seed)
    try:
        net = MDM(N, tokenizer.V, D, depth, n_head, len(words), T).to(device)
        optimizers = make_optimizers(net, muon_lr, lr, (0.9, 0.98), weight_decay)
    except ValueError as error:
        raise SystemExit(f'model.py: {error}') from None
    same_weights(net)
    average = MDM(**net.config).to(device).requires_grad_(False)
    average.load_state_dict(net.state_dict())
    step, stop, smooth = 0, Stop(), torch.zeros((), device=device)
    if resume:
        state = load_resumed(out, 'model', config)
        restore(net, state['net'], out, 'net')
        restore(average, state['ema'], out, 'ema')
        restore_optimizers(optimizers, state['optimizers'], out)
        step, smooth = state['step'], state['smooth'].to(device)
    forward = torch.compile(net) if compile else net
    if rank == 0:
        log = Log(out, step) if not bench else None
        print(f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(dataset)} images, {N} tokens '
              f'and {T} words, {steps} updates of {batch_size} = {world} x {accumulate} x {micro}')
    prompts = images.batch(np.linspace(0, images.length - 1, 32).astype(int))[1]

    def update():
        """One training step -> masked cross-entropy, gradient norm."""
        set_rate(optimizers, min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        net.zero_grad()
        for k in range(accumulate):
            rng = rng_for(seed, step, rank * accumulate + k, device)
            index = torch.randint(len(dataset), (micro,), generator=rng, device=device).sort().values
            rows = torch.from_numpy(dataset[index.cpu().numpy()])
            tokens, cond = rows.long().to(device).split([N, T], 1)
            cond = torch.where(random_numbers((micro, 1), rng, device) < p_drop, net.null(cond), cond)
            x, mask = remask(tokens, net.mask_id, schedule, rng, p_full)
            with autocast:
                logits = forward(x, cond)
            loss = F.cross_entropy(logits[mask].float(), tokens[mask])       # masked positions only, as MaskGIT
            loss.backward()
        return loss.detach(), apply_gradients(list(net.parameters()), optimizers, accumulate * world)

    if bench:
        report_bench(update, batch_size, device, autocast)
        raise SystemExit
    bar = progress(steps, 'teacher', step)
    while True:
        # Save, show, stop
        ending = step >= steps or stop.now(step, device)
        if rank == 0 and step and (step % save_every == 0 or ending):
            save_checkpoint(out, dict(
                stage='model', step=step, config=config, args=net.config, words=words, data=data, smooth=smooth,
                net=net.state_dict(), ema=average.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                tokenizer=tokenizer.pack(), prompts=torch.from_numpy(np.array(dataset[:, N:])).short()))
        if rank == 0 and (step % save_every == 0 or ending):
            sample = lambda cond, rng: sample_teacher(average, cond, min(16, N), rng=rng)
            shown, _ = render(sample, tokenizer, word_ids(prompts, words, T), seed)
            save_grid(f'{out_dir}/model.png', shown, prompts)
        if ending:
            break
        # -------------------------------------------------------------------------
        loss, norm = update()
        ema_update(average, net, ema_decay, step)
        smooth = loss if step == 0 else torch.lerp(smooth, loss, 0.02)
        step += 1
        bar.update()
        if rank == 0 and (step % log_every == 0 or step % save_every == 0 or step == steps):
            check_finite(step, lr=norm)
        if step % log_every == 0 and rank == 0:
            row = dict(step=step, loss=round(smooth.item(), 4), norm=round(norm.item(), 4))
            bar.set_postfix(row, refresh=False)
            log.write(row)
    bar.close()
    end_processes()
