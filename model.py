"""
Tokens: the masked diffusion transformer, and every equation that the stages share.

    image -> ids (B, N) -> logits (B, N, V) -> soft embedding (B, L, D) -> loss

In order: the transformer with its soft-embedding input; random numbers, masking, token initialisation; guidance and the
multi-step teacher sampler; the one-step generator; the relaxations; the Di[M]O divergence, its surrogate and the
auxiliary loss; and, run as a script, the training of the small teacher. Simplified against MaskGIT: no dropout, exact
mask counts, loss on masked tokens only.

$ python model.py                               # shapes world, about 4 minutes on 2 CPU cores -> out/model.pt
$ python model.py --data=my_images              # your folder, with the tokenizer trained on it
$ torchrun --nproc_per_node=8 model.py --D=384 --depth=12 --n_head=6 --batch_size=512
Expected (shapes world): masked cross-entropy of 0.22 to 0.25 nats, and shapes that a person can name in out/model.png.
"""
import math
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer import bit_rows

# -----------------------------------------------------------------------------
# I/O
data = 'shapes'        # 'shapes', 'shapes-open' (background left open: the stress test), or a folder of class folders or of captioned images
out_dir = 'out'        # tokenizer.pt is found here; model.pt, log, pictures and the token cache go here
n_images = 50_000      # training images of the shapes world, encoded once; a folder is used whole
flips = False          # also encode every image mirrored, left and right of its caption too; MaskGIT and MaskBit True
resume = False         # continue from out_dir/model.pt to the same bits
overwrite = False      # a model.pt that is there may be replaced by a new run
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
micro_batch = 0        # images per forward pass on one device, 0 = all; lower it to save memory
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

LIMITS = dict(         # a number is the least value, a pair a range, words a choice
    n_images=8, log_every=1, save_every=1, D=1, depth=1, n_head=1, steps=1, batch_size=1,
    micro_batch=0, lr=0, muon_lr=0, weight_decay=0, schedule=('arccos', 'cosine'), p_full=(0, 1),
    p_drop=(0, 1), ema_decay=(0, 1))

# What counts only with a choice of `in_use` below; what is named nowhere always counts
USES = {'--data=shapes': 'n_images', '--data=shapes-open': 'n_images'}
# -----------------------------------------------------------------------------
# The transformer

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, (B, H, L, d) each. A CPU's fused kernel is slow in bf16, its backward
    most of all, so it is written out there."""
    if q.is_cuda or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)     # (B, H, L, L)
    return scores.float().softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    """Attention and MLP with residuals, norms before (MaskGIT) or after (MaskBit): (B, L, D) -> (B,
    L, D)."""

    def __init__(self, D, n_head, mlp, post_norm, eps):
        super().__init__()
        self.n_head, self.post_norm = n_head, post_norm
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        wide, narrow = nn.Linear(D, mlp), nn.Linear(mlp, D)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)

    def attention(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                   # (B, H, L, D / H) each
        h = attend(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, L, D))

    def forward(self, x):
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MDM(nn.Module):
    """Masked diffusion transformer over N tokens of V codes, conditioned on T appended words (a
    class is one word).

    The layout is MaskGIT's (Chang et al. 2022, PyTorch reproduction): tied output table and a bias
    per position. With `bits` it is MaskBit's: a code is `bits` numbers -1/+1, S tokens share one of
    the L = N / S positions, output table of its own, norms after. `cond` is int64 word ids (B, T),
    or labels (B,) where T = 1; id n_words means "no word", and a row of only that is the null
    condition. The mask id is V.
    """

    def __init__(self, N, V, D, depth, n_head, n_words, T=1, mlp=0, post_norm=False, eps=1e-5, bits=0, S=1):
        super().__init__()
        mlp = mlp or 4 * D
        self.config = dict(N=N, V=V, D=D, depth=depth, n_head=n_head, n_words=n_words, T=T, mlp=mlp,
                           post_norm=post_norm, eps=eps, bits=bits, S=S)
        if D % n_head:
            raise ValueError(f'width D = {D} is not a multiple of n_head = {n_head}')
        self.N, self.V, self.D = N, V, D
        self.L = N // S                                        # positions in the transformer
        self.mask_id, self.n_words = V, n_words
        self.grid = square_grid(self.L)
        self.law = 'maskbit' if bits else 'maskgit'            # the sampler it was published with
        self.checkpointing = False                             # recompute blocks in backward: less memory
        self.pos_emb = nn.Parameter(torch.zeros(1, self.L + T, D))
        if bits:
            codes_and_mask = F.pad(bit_rows(bits), (0, 0, 0, 1))     # (V + 1, bits), the mask is zeros
            self.register_buffer('codes', codes_and_mask)
            self.input_proj = nn.Linear(S * bits, D)
            self.output = nn.Linear(D, S * V)
        else:
            self.tok_emb = nn.Embedding(V + 1, D)              # codes, then the mask
            self.input_proj = nn.Identity()
            self.bias = nn.Parameter(torch.zeros(N, V))
        self.cond_emb = nn.Embedding(n_words + 1, D)           # words, then "no word"
        self.first = nn.Sequential(norm_of(D))
        if not post_norm:
            self.first.extend([nn.Linear(D, D), nn.GELU(), norm_of(D), nn.Linear(D, D)])
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(Block(D, n_head, mlp, post_norm, eps))
        self.last = nn.Sequential()
        if not post_norm:
            self.last.append(norm_of(D))
        self.last.extend([nn.Linear(D, D), nn.GELU(), norm_of(D)])
        for name, p in self.named_parameters():
            if p.dim() > 1 and name != 'bias':
                nn.init.trunc_normal_(p, std=0.02)

    @property
    def table(self):
        """The codes as vectors, the mask last: (V + 1, D), or (V + 1, bits) before `input_proj`."""
        return self.codes if self.config['bits'] else self.tok_emb.weight

    def embed(self, x, mask=None):
        """Ids (B, N), mask id allowed, or probabilities (B, N, V) -> token embeddings (B, L, D),
        before positions. Positions where mask (B, N) is True get the mask embedding. Probabilities
        give the soft embedding, for bits the projection of the expected bits; a one-hot gives
        exactly the hard one. Raises ValueError for other shapes."""
        emb = expected_rows(x, self.table, self.N, mask)       # (B, N, bits or D)
        return self.input_proj(emb.reshape(len(x), self.L, -1))      # S tokens side by side: (B, L, D)

    def features(self, emb, cond, layers):
        """Embeddings (B, L, D) -> hidden states (B, L, D) of the image positions after the blocks
        in `layers`, counted from 1, in that order. For the discriminator heads and the output.
        Raises ValueError."""
        if not layers or min(layers) < 1 or max(layers) > len(self.blocks):
            raise ValueError(f'layers {layers}: expected some of the blocks 1 to {len(self.blocks)}')
        words = self.words(cond)                               # (B, T, D)
        h = torch.cat([emb, words.to(emb.dtype)], 1)
        h = self.first(h + self.pos_emb)
        h = h.to(self.pos_emb.dtype)                           # (B, L + T, D), not bf16: blocks add up
        states = []
        for block in self.blocks[:max(layers)]:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h)
            states.append(h[:, :self.L])                       # views, no copies
        return [states[k - 1] for k in layers]

    def forward(self, x, cond, sigma=0.0, rng=None):
        """Ids (B, N), probabilities (B, N, V) or embeddings (B, L, D) -> logits (B, N, V), without
        a mask entry. `sigma` mixes noise into the token embeddings (`add_noise`), not into the
        condition."""
        emb = x if self.is_embedding(x) else self.embed(x)
        emb = add_noise(emb, sigma, rng)
        h = self.features(emb, cond, [len(self.blocks)])[0]
        h = self.last(h)
        if self.config['bits']:
            return self.output(h).view(len(h), self.N, self.V)
        return F.linear(h, self.tok_emb.weight[:self.V]) + self.bias     # the tied row V, the mask, is dropped

    def is_embedding(self, x):
        return is_embedding(x, self)

    def words(self, cond):
        return self.cond_emb(cond.view(len(cond), -1))         # (B, T, D)

    def pooled(self, cond):
        """The condition as one vector, for the discriminator heads: (B, T D)."""
        return self.words(cond).flatten(1)

    def null(self, cond):
        """The unconditional condition of the same batch."""
        return torch.full_like(cond, self.n_words)

    def embedding_parameters(self):
        """The tables that Di[M]O keeps frozen (MaskGIT's is the output table too)."""
        tables = ('tok_emb', 'input_proj', 'cond_emb')
        return [p for name, p in self.named_parameters() if name.startswith(tables)]

    @classmethod
    def from_pretrained(cls, kind, path, n_head=None, V=None, grid=0, axes=None):
        """Published weights from their file, its folder, or the dict that it holds; 'random' is the
        published size with random weights. kind: maskgit, maskbit; maskgen, meissonic are classes
        of their own. Sizes are read off the shapes. What they do not tell has the published value
        unless given: n_head; V, where the table holds other rows too; Meissonic's grid (tokens a
        side) and rotary axes. Errors: ValueError, FileNotFoundError, one line."""
        from common.teachers import published_transformer
        return published_transformer(kind, path, n_head, V, grid, axes)


def expected_rows(x, table, N, mask=None):
    """Ids (B, N) or probabilities (B, N, V), and a table (V + 1, d) whose last row is the mask ->
    rows (B, N, d), those of the ids or their expectation. Positions where mask (B, N) is True get
    the mask. Raises ValueError."""
    V = len(table) - 1
    if x.is_floating_point():
        if x.shape[1:] != (N, V):
            raise ValueError(f'embed expects probabilities (B, {N}, {V}), got {tuple(x.shape)}')
        with torch.autocast(x.device.type, enabled=False):     # exact for a one-hot in bf16 runs too
            # E[e] = sum_v p_v e_v, Soft-Di[M]O (arXiv 2509.22925) Eq. 3
            rows = x.to(table.dtype) @ table[:V]
    else:
        if x.shape[1:] != (N,):
            raise ValueError(f'embed expects ids (B, {N}), got {tuple(x.shape)}')
        rows = F.embedding(x, table)
    if mask is not None:
        rows = torch.where(mask[..., None], table[V].to(rows.dtype), rows)
    return rows


def is_embedding(x, model):
    """Is x embeddings (B, L, D), not probabilities (B, N, V) or ids? Told by the shape; where both
    have the same, by what only probabilities do: they sum to 1."""
    if not x.is_floating_point() or x.shape[1:] != (model.L, model.D):
        return False
    if (model.N, model.V) != (model.L, model.D):
        return True
    sums_to_one = (x.sum(-1) - 1).abs().max() < 1e-2
    return not ((x > -1e-2).all() and sums_to_one)


def norm_of(D):
    return nn.LayerNorm(D, eps=1e-12)


def square_grid(L):
    """(rows, columns) of L positions that form a square, else None."""
    side = math.isqrt(L)
    return (side, side) if side * side == L else None


# -----------------------------------------------------------------------------
# Random numbers

def random_numbers(shape, rng, device, normal=False):
    """Uniform [0, 1) or normal numbers (B, ...). `rng` is None, one torch.Generator, or a list with
    one per image, which makes an image independent of the batch it is drawn in. Or it is any object
    with the methods numbers(shape, normal) and choose(probs), which decides itself: so a recorded
    stream is replayed."""
    if hasattr(rng, 'numbers'):
        return rng.numbers(shape, normal).to(device)
    noise = torch.randn if normal else torch.rand
    if isinstance(rng, list):
        rows = [noise(shape[1:], generator=one, device=one.device) for one in rng]
        return torch.stack(rows).to(device)
    source = device if rng is None else rng.device
    return noise(shape, generator=rng, device=source).to(device)


def gumbel_noise(shape, rng, device):
    """Standard Gumbel numbers -log(-log u)."""
    u = random_numbers(shape, rng, device)
    return -torch.log(-torch.log(u.clamp(1e-9, 1 - 1e-7)))


def categorical(probs, rng=None):
    """One draw per position from probs (B, N, V) by inverting the cumulative sum -> ids (B, N)."""
    if hasattr(rng, 'choose'):                                 # as in random_numbers
        return rng.choose(probs)
    total = probs.float().cumsum(-1)
    u = random_numbers(probs.shape[:2], rng, probs.device)
    u = u * total[..., -1]
    ids = (total <= u[..., None]).sum(-1)
    return ids.clamp(max=probs.shape[-1] - 1)


def random_positions(shape, count, rng, device):
    """bool (B, N) with exactly count (B, 1) True per row, at random positions."""
    order = random_numbers(shape, rng, device).argsort(1).argsort(1)     # a random permutation, (B, N)
    return order < count


# -----------------------------------------------------------------------------
# Masking, token initialisation

def mask_ratio(u, schedule='arccos'):
    """u uniform in [0, 1] -> mask ratio t in [0, 1]: arccos(u) / (pi / 2) (MaskGIT) or cos(pi u /
    2) (Meissonic). Raises ValueError for another schedule."""
    if schedule == 'arccos':
        return torch.arccos(u) / (math.pi / 2)
    if schedule == 'cosine':
        return torch.cos(math.pi / 2 * u)
    raise ValueError(f'unknown schedule {schedule!r}; expected arccos or cosine')


def mask_tokens(tokens, ratio, rng=None):
    """Which of the tokens (B, N) to mask at ratio t (B,): bool (B, N), exactly max(1, round(t N))
    True in each row. x_t = tokens.masked_fill(mask, mask_id)."""
    N = tokens.shape[1]
    ratio = torch.as_tensor(ratio, device=tokens.device)
    ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32))    # bf16 counts to 256
    count = (ratio * N).round().clamp(1, N).expand(len(tokens))
    return random_positions(tokens.shape[:2], count[:, None], rng, tokens.device)


def remask(tokens, mask_id, schedule, rng, p_full=0.0, p_near=0.0):
    """Forward process on tokens (B, N) -> x_t (B, N), mask (B, N) at ratios t ~ schedule (Di[M]O,
    arXiv 2503.15457, one-step generator). Ours: with probability p_full everything is masked, where
    only marginals are judged, and with p_near all but 1 to N / 8 tokens, which shows one object or
    choice and asks for the others."""
    N = tokens.shape[1]
    u, kind = random_numbers((2, len(tokens)), rng, tokens.device)
    t = mask_ratio(u, schedule)
    t = t.masked_fill(kind < p_near + p_full, 1.0)
    nearly_all = 1 - (u * N / 8).ceil() / N
    t = torch.where(kind < p_near, nearly_all, t)
    mask = mask_tokens(tokens, t, rng)
    return tokens.masked_fill(mask, mask_id), mask


def init_tokens(B, N, V, r_init, rng=None, device='cpu'):
    """Generator input x_init (B, N): uniformly random codes, exactly round(r_init N) random
    positions replaced by the mask id V (Di[M]O, arXiv 2503.15457, token initialisation)."""
    u = random_numbers((B, N), rng, device)
    codes = (u * V).long().clamp(max=V - 1)
    hidden = random_positions((B, N), round(r_init * N), rng, device)
    return codes.masked_fill(hidden, V)


def add_noise(emb, sigma, rng=None):
    """sqrt(1 - sigma^2) e + sigma n for embeddings (B, L, D) (Di[M]O, arXiv 2503.15457, token
    initialisation)."""
    if sigma == 0:
        return emb
    n = random_numbers(emb.shape, rng, emb.device, normal=True).to(emb.dtype)
    return math.sqrt(1 - sigma ** 2) * emb + sigma * n


# -----------------------------------------------------------------------------
# Conditions and guidance

def batch_of(cond):
    """How many images a condition is for: a tensor (B, ...) or a tuple of such."""
    return len(cond[0]) if isinstance(cond, tuple) else len(cond)


def both(cond, null):
    """Two conditions, tensors or tuples of tensors, as one batch."""
    if isinstance(cond, tuple):
        return tuple(torch.cat(pair) for pair in zip(cond, null, strict=True))
    return torch.cat([cond, null])


def guided_logits(model, x, cond, cfg_scale):
    """u + s (c - u), both halves in one batch: x (B, N) -> logits (B, N, V). s = 1 needs no second
    half."""
    if cfg_scale == 1:
        return model(x, cond)
    logits = model(torch.cat([x, x]), both(cond, model.null(cond)))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))     # s would magnify bf16's rounding
    c, u = logits.chunk(2)
    return torch.lerp(u, c, cfg_scale)                         # u + s (c - u)


# -----------------------------------------------------------------------------
# The teacher's multi-step samplers

# Per step: tokens to reveal, share of guidance, share of noise, softmax temperature
Plan = namedtuple('Plan', 'counts guidance noise tau')
LAWS = ('maskgit', 'maskbit', 'maskgen', 'meissonic')


def reveal_counts(steps, N):
    """MaskGIT's arccos schedule: how many tokens each of the sampling steps reveals, at least 1, N
    in all."""
    if not 1 <= steps <= N:
        raise ValueError(f'steps must lie in 1..{N} (the number of tokens), got {steps}')
    if steps == 1:
        return [N]
    v = mask_ratio(1 - torch.arange(steps) / (steps - 1))      # arccos(1 - j / (n - 1)) / (pi / 2)
    counts = (v / v.sum() * N).round().clamp(min=1).long().tolist()
    counts[-1] += N - sum(counts)
    while counts[-1] < 1:                                      # only with nearly as many steps as tokens
        counts[-1] += 1
        counts[counts.index(max(counts))] -= 1
    return counts


def counts_of(wanted, N):
    """Tokens to reveal per step, from the wanted number still masked after each step but the last:
    at least 1 and fewer than before; none at the end."""
    masked = [N]
    for number in wanted:
        masked.append(min(max(1, number), masked[-1] - 1))
    masked.append(0)
    return [before - after for before, after in zip(masked, masked[1:])]


def sampling_plan(steps, N, law='maskgit', power=3.0):
    """The published samplers in numbers per step -> Plan, q = (j + 1) / n being the progress.
    MaskGIT alone counts what it reveals (`reveal_counts`); the others what stays masked, floor(N
    ratio(q)). `power` is MaskBit's. Raises ValueError for another law or more steps than tokens."""
    if law not in LAWS:
        raise ValueError(f'unknown law {law!r} of the sampler; expected {" or ".join(LAWS)}')
    counts = reveal_counts(steps, N)
    j = torch.arange(steps)                                    # ratios in float32, as published
    q = (j + 1) / steps
    tau = torch.ones(steps)
    if law == 'maskgit':
        guidance = j / max(1, steps - 1)
        noise = 1 - guidance
    else:
        schedule = 'cosine' if law == 'meissonic' else 'arccos'
        wanted = (N * mask_ratio(q[:-1], schedule).clamp(1e-6, 1)).floor()
        counts = counts_of(wanted.int().tolist(), N)
    if law == 'maskbit':
        if power < 0:
            raise ValueError(f'power = {power} of the maskbit law, expected 0 or more (published 2.5 or 3)')
        guidance = (1 - torch.cos(math.pi * (j / steps) ** power)) / 2
        noise = 1 - q
    if law == 'maskgen':
        # published as c + s (c - u) with s from 1 to 12, which is u + s (c - u) with s from 2 to 13
        guidance = (1 + 11 * (1 - torch.cos(math.pi * q)) / 2) / 12
        noise = 1 - q
        tau = 0.5 + 0.8 * (1 - q)
    if law == 'meissonic':
        guidance = torch.ones(steps)
        noise = torch.linspace(1, 0, steps)
    return Plan(counts, guidance.tolist(), noise.tolist(), tau.tolist())


def guidance_at(share, cfg_scale):
    """From 1 (none) to cfg_scale."""
    return 1 + (cfg_scale - 1) * share


def teacher_passes(model, steps, cfg_scale, law='', power=3.0):
    """Network passes of `sample_teacher`: guidance doubles the steps where it is not 1, as it is at
    the first."""
    plan = sampling_plan(steps, model.N, law or model.law, power)
    guided = [guidance_at(share, cfg_scale) != 1 for share in plan.guidance]
    return steps + sum(guided)


def filter_probs(probs, top_k=0, top_p=0.0):
    """Keep the top_k likeliest codes (0: all) and the smallest set of total probability >= top_p
    (0: all)."""
    if top_k:
        top_k = min(top_k, probs.shape[-1])
        least = probs.topk(top_k).values[..., -1:]
        probs = probs * (probs >= least)
    if top_p:
        ordered, index = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        keep = before < top_p * ordered.sum(-1, keepdim=True)
        probs = probs * torch.zeros_like(probs).scatter(-1, index, keep.to(probs.dtype))
    return probs


def draw_by_probability(z, noise, rng, top_k, top_p):
    """How the other laws choose: one draw per position from softmax(z), confidence log p -> ids,
    confidence (B, N)."""
    probs = filter_probs(z.softmax(-1), top_k, top_p)
    tokens = categorical(probs, rng)
    return tokens, probs.gather(-1, tokens[..., None])[..., 0].log()


def draw_by_logit(z, noise, rng, top_k, top_p):
    """How MaskGen chooses: argmax of z + noise g, a draw from softmax(z / noise) that becomes the
    argmax as the noise fades; confidence is the logit itself -> ids, confidence (B, N)."""
    if top_k or top_p:
        probs = filter_probs(z.softmax(-1), top_k, top_p)
        z = z.masked_fill(probs == 0, -torch.inf)
    tokens = (z + noise * gumbel_noise(z.shape, rng, z.device)).argmax(-1)
    return tokens, z.gather(-1, tokens[..., None])[..., 0]


def told_the_step(cond, left):
    """Meissonic's condition with the number of steps left as its timestep, the last of the
    micro-conditions."""
    words, pooled, micro, *rest = cond
    micro = torch.cat([micro[:, :-1], torch.full_like(micro[:, -1:], left)], 1)
    return (words, pooled, micro, *rest)


@torch.no_grad()
def sample_teacher(model, cond, steps, cfg_scale=1.5, gumbel=8.0, tau=1.0, rng=None, top_k=0, top_p=0.0, law='',
                   power=3.0):
    """The confidence sampler of MaskGIT and its heirs -> tokens (B, N). At each step of
    `sampling_plan`: guidance 1 + (s - 1) share; a token per position at temperature tau; to its
    confidence comes gumbel share g; the most confident are revealed and stay. `law` '' is the
    model's own. Published steps, cfg_scale, gumbel: MaskGIT 8, 4, 4.5; MaskBit (14 bits) 64, 8.1,
    7.8; MaskGen 16, 13, 2; Meissonic 64, 9, 2."""
    device = next(model.parameters()).device
    law = law or model.law
    draw = draw_by_logit if law == 'maskgen' else draw_by_probability
    x = torch.full((batch_of(cond), model.N), model.mask_id, device=device)
    plan = sampling_plan(steps, model.N, law, power)
    for j in range(steps):
        if model.law == 'meissonic':
            cond = told_the_step(cond, steps - 1 - j)
        logits = guided_logits(model, x, cond, guidance_at(plan.guidance[j], cfg_scale)).float()
        noise = gumbel * plan.noise[j]
        tokens, confidence = draw(logits / (tau * plan.tau[j]), noise, rng, top_k, top_p)
        confidence = confidence + noise * gumbel_noise(x.shape, rng, device)
        confidence[x != model.mask_id] = -torch.inf
        chosen = confidence.topk(plan.counts[j]).indices
        x.scatter_(1, chosen, tokens.gather(1, chosen))
    return x


def teacher_sampler(teacher, steps, cfg_scale, gumbel):
    """A sampler for pictures and tables: (cond, rng) -> tokens (B, N) in `steps` steps."""
    def sample(cond, rng):
        return sample_teacher(teacher, cond, steps, cfg_scale, gumbel, rng=rng)
    return sample


# -----------------------------------------------------------------------------
# The one-step generator

def start_embedding(generator, B, r_init, sigma_init, rng=None):
    """What the generator starts from: x_init embedded, plus noise -> (B, L, D) (Di[M]O, token
    initialisation)."""
    device = next(generator.parameters()).device
    x_init = init_tokens(B, generator.N, generator.V, r_init, rng, device)
    return add_noise(generator.embed(x_init), sigma_init, rng)


@torch.no_grad()
def draw_tokens(logits, tau=1.0, rng=None, top_k=0, top_p=0.0):
    """tokens ~ Categorical(softmax(z / tau)), one draw per position: logits (B, N, V) -> ids (B,
    N)."""
    probs = (logits.float() / tau).softmax(-1)
    return categorical(filter_probs(probs, top_k, top_p), rng)


def one_step(generator, cond, r_init=0.6, sigma=0.1, tau=1.0, rng=None, top_k=0, top_p=0.0):
    """The whole one-step model: z = G(x_init, c), tokens ~ softmax(z / tau) -> logits (B, N, V),
    tokens (B, N). Gradients flow through the logits only (Di[M]O, arXiv 2503.15457, one-step
    generator)."""
    emb = start_embedding(generator, batch_of(cond), r_init, sigma, rng)
    logits = generator(emb, cond)
    return logits, draw_tokens(logits, tau, rng, top_k, top_p)


def student_sampler(generator, r_init, sigma_init, tau_sample, top_k=0, top_p=0.0):
    """A sampler for pictures and tables: (cond, rng) -> tokens (B, N) in one pass."""
    def sample(cond, rng):
        return one_step(generator, cond, r_init, sigma_init, tau_sample, rng, top_k, top_p)[1]
    return sample


# -----------------------------------------------------------------------------
# Relaxations: what stands in for sampled tokens where gradients must pass

def relaxed(logits, relax='soft', tau=1.0, rng=None):
    """A differentiable stand-in for the sampled tokens: logits (B, N, V) -> probabilities (B, N, V)
    for `MDM.embed` or `Tokenizer.decode`. soft: softmax(z / tau), the expectation (Soft-Di[M]O,
    arXiv 2509.22925); gumbel: hard Gumbel straight-through; st: a hard sample forward, the softmax
    backward. Raises ValueError for another word."""
    if relax not in ('soft', 'gumbel', 'st'):
        raise ValueError(f'unknown relaxation {relax!r}; expected soft, gumbel or st')
    z = logits.float() / tau
    if relax == 'gumbel':
        z = z + gumbel_noise(z.shape, rng, z.device)
    probs = z.softmax(-1)                                      # (B, N, V)
    if relax == 'soft':
        return probs
    ids = probs.argmax(-1) if relax == 'gumbel' else categorical(probs.detach(), rng)
    return F.one_hot(ids, z.shape[-1]) + (probs - probs.detach())        # the forward value is exactly one-hot


@torch.no_grad()
def relaxation_bias(f, probs, table, rng=None, samples=32):
    """What soft embeddings cost: |f(E[e]) - E[f(e)]| and its bound (Lip / 2) tr Cov(e)
    (Soft-Di[M]O, arXiv 2509.22925). f: embeddings (B, N, d) -> (B, ...); probs (B, N, V); table (V,
    d) -> bias, bound, tr Cov(e), each (B,). Lip, the Lipschitz constant of f's gradient, is the
    largest found on the segments from E[e] to `samples` draws."""
    mean = probs @ table                                       # E[e], (B, N, d)
    second_moment = probs @ table.square().sum(1)              # E|e|^2, (B, N)
    trace = (second_moment - mean.square().sum(-1)).sum(-1)    # tr Cov(e), (B,)
    at_mean = f(mean).flatten(1)
    bias, lip, h = 0, torch.zeros_like(trace), 1e-2
    for _ in range(samples):
        d = table[categorical(probs, rng)] - mean
        difference = f(mean + h * d) - f(mean - h * d)
        slope = difference.flatten(1) / (2 * h)                # J d, whose expectation is 0
        rest = f(mean + d).flatten(1) - at_mean - slope        # Taylor's remainder, <= Lip / 2 |d|^2
        bias = bias + rest / samples
        curvature = 2 * rest.norm(dim=1) / d.square().sum((1, 2))
        lip = torch.maximum(lip, curvature)
    return bias.norm(dim=1), lip / 2 * trace, trace


# -----------------------------------------------------------------------------
# The Di[M]O divergence and the losses

def log_probs(logits):
    """log softmax over V in float32, or in float64 if that is what comes in."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1)


LARGE = 2 ** 22                        # numbers: from here on an image's logits are a loss by themselves


def is_large(logits):
    """Several images of (N, V) logits so large that the four or five temporaries of a loss, in
    float32, should not be there for all of them at once (Meissonic: 134 MB each)."""
    B, N, V = logits.shape
    return B > 1 and N * V >= LARGE


def jeffreys(teacher_logits, aux_logits, mask, beta):
    """Generalized Jeffreys divergence D = (1 - beta) KL(teacher || aux) + beta KL(aux || teacher),
    summed over masked positions: logits (B, N, V), mask (B, N) -> (B,). beta may be negative
    (Di[M]O, arXiv 2503.15457)."""
    if is_large(aux_logits):
        parts = zip(teacher_logits.split(1), aux_logits.split(1), mask.split(1))
        return torch.cat([jeffreys(p, q, m, beta) for p, q, m in parts])
    log_p, log_q = log_probs(teacher_logits), log_probs(aux_logits)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)          # KL(teacher || aux), (B, N)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)          # KL(aux || teacher)
    return (((1 - beta) * forward + beta * reverse) * mask).sum(-1)


def dimo_grad(teacher_logits, aux_logits, mask, beta):
    """Gradient of `jeffreys` with respect to the auxiliary logits, in closed form: (B, N, V), zero
    where not masked. Forward part p_aux - p_teacher; reverse part p_aux (log p_aux - log p_teacher
    - KL(aux || teacher))."""
    if is_large(aux_logits):                                   # image by image: less memory
        parts = zip(teacher_logits.split(1), aux_logits.split(1), mask.split(1))
        return torch.cat([dimo_grad(p, q, m, beta) for p, q, m in parts])
    log_p, log_q = log_probs(teacher_logits), log_probs(aux_logits)
    q, gap = log_q.exp(), log_q - log_p
    kl = (q * gap).sum(-1, keepdim=True)                       # KL(aux || teacher), (B, N, 1)
    forward = q - log_p.exp()
    reverse = q * (gap - kl)
    return ((1 - beta) * forward + beta * reverse) * mask[..., None]


def surrogate(logits, grad):
    """A loss whose gradient at the generator's logits z is `grad` / B; its *value* means nothing
    (log `jeffreys`). Summed over positions and codes, as in the released code."""
    return (logits.float() * grad.detach()).sum() / len(logits)


def aux_loss(aux_logits, tokens, mask, label_smoothing=0.0):
    """Cross-entropy of logits (B, N, V) on tokens (B, N) at masked positions, of which each image has
    one. The auxiliary model learns by it to be the generator's own masked diffusion model (Di[M]O,
    arXiv 2503.15457, auxiliary update), the teacher the data's."""
    if is_large(aux_logits):                                   # image by image, once more in the backward pass
        parts = zip(aux_logits.split(1), tokens.split(1), mask.split(1))
        means = [checkpoint(aux_loss, q, x, m, label_smoothing, use_reentrant=False) for q, x, m in parts]
        return (torch.stack(means) * mask.sum(1)).sum() / mask.sum()
    return F.cross_entropy(aux_logits[mask].float(), tokens[mask], label_smoothing=label_smoothing)


def token_entropy(logits):
    """Mean entropy in nats and mean largest probability of softmax(logits): how peaked the
    generator is."""
    log_p = log_probs(logits.detach())
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return entropy, log_p.max(-1).values.exp().mean()


# -----------------------------------------------------------------------------
# Training the small teacher

def in_use(s):
    """Which words of USES count with the settings `s`."""
    return [f'--data={s.data}']


if __name__ == '__main__':
    import os
    from types import SimpleNamespace

    import numpy as np

    from common.files import (Log, check_origin, claim, digest_of, load_checkpoint, load_resumed, note_unfinished,
                              optimizer_states, restore, restore_optimizers, resumes, save_checkpoint)
    from common.images import TokenData, id_type, open_data, token_data, word_encoder
    from common.metrics import render
    from common.pictures import save_grid
    from common.run import (Stop, check_finite, configure, cosine_law, ema_update, end_run, make_optimizers,
                            micro_rng, millions, progress, report_bench, same_weights, set_rates,
                            start_run, take_step)
    from common.teachers import unpack_tokenizer

    config = configure(globals())
    run = start_run(batch_size, micro_batch)

    # Load the tokenizer, open the data
    out = os.path.join(out_dir, 'model.pt')
    if not bench:
        claim(out, resume or overwrite)
    tokenizer_path = os.path.join(out_dir, 'tokenizer.pt')
    packed = load_checkpoint(tokenizer_path, 'tokenizer', 'Train it with: python tokenizer.py', fallback=True)
    tokenizer = unpack_tokenizer(packed, place=tokenizer_path).to(run.device)
    source = open_data(data, tokenizer.config['image_size'], n_images, out_dir=out_dir)
    words, T = list(source.words), source.caption_length
    origin = dict(tokenizer=tokenizer.digest(), vocabulary=digest_of(words), data=source.digest())
    check_origin(tokenizer_path, packed, origin)
    note_unfinished(packed, tokenizer_path)

    # Build the network, its average and the optimizers
    torch.manual_seed(seed)
    net = MDM(tokenizer.N, tokenizer.V, D, depth, n_head, len(words), T)
    net.to(run.device)
    optimizers = dict(net=make_optimizers(net, muon_lr, lr, (0.9, 0.98), weight_decay))
    same_weights(net)
    average = MDM(**net.config).to(run.device).requires_grad_(False)
    average.load_state_dict(net.state_dict())
    step, smooth = 0, torch.zeros((), device=run.device)
    if resumes(resume, out):
        state = load_resumed(out, 'model', config)
        check_origin(out, state, origin)
        restore(net, state['net'], out, 'net')
        restore(average, state['ema'], out, 'ema')
        restore_optimizers(optimizers, state['optimizers'], out)
        step, smooth = state['step'], state['smooth'].to(run.device)
    forward = torch.compile(net) if compile else net

    # Encode the data
    table = token_data(source, tokenizer, out_dir, run.device, flips=flips)    # (M, N + T)
    dataset = TokenData(table, tokenizer.N, source)
    prompt_ids = torch.from_numpy(table[:, tokenizer.N:].astype(id_type(len(words) + 1)))    # (M, T)

    def update():
        """One training step -> masked cross-entropy of the last micro-batch, gradient norm."""
        set_rates(optimizers['net'], cosine_law(step, steps, warmup=100))
        net.zero_grad()
        for k in range(run.accumulate):
            rng = micro_rng(seed, step, k, run)
            tokens, cond = dataset.draw_ids(run, rng)
            dropped = random_numbers((run.micro, 1), rng, run.device) < p_drop
            cond = torch.where(dropped, net.null(cond), cond)
            x_t, mask = remask(tokens, net.mask_id, schedule, rng, p_full)
            with run.autocast:
                logits = forward(x_t, cond)
            loss = aux_loss(logits, tokens, mask)              # masked positions only, as MaskGIT
            loss.backward()
        return loss.detach(), take_step(net, optimizers['net'], run, clip=1.0)

    # Print the plan
    if run.rank == 0:
        print(f'{millions(net):.2f} M parameters, {len(dataset)} images, {net.N} tokens and {T} words')
        print(f'{steps} updates of {batch_size} = {run.world} x {run.accumulate} x {run.micro}')
    if bench:
        report_bench(update, batch_size, run)
        raise SystemExit
    log = Log(out, step) if run.rank == 0 else None
    shown = source.batch(np.linspace(0, source.length - 1, 32).astype(int))[1]
    loaded = SimpleNamespace(tokenizer=tokenizer, encode=word_encoder(words, T, run.device), device=run.device)
    sampler = teacher_sampler(average, min(16, net.N), cfg_scale=1.5, gumbel=8.0)

    bar, stop = progress(steps, 'teacher', step), Stop()
    while True:
        # Save, show, stop
        ending = step >= steps or stop.now(step, run.device)
        if run.rank == 0 and (step % save_every == 0 or ending):
            if step:
                state = dict(stage='model', step=step, config=config, origin=origin, smooth=smooth)
                state.update(args=net.config, words=words, data=data, prompts=prompt_ids)
                state.update(net=net.state_dict(), ema=average.state_dict(), tokenizer=tokenizer.pack())
                state.update(optimizers=optimizer_states(optimizers))
                save_checkpoint(out, state)
            pictures, _ = render(sampler, loaded, shown, seed)
            save_grid(f'{out_dir}/model.png', pictures, shown)
        if ending:
            break
        # -------------------------------------------------------------------------
        loss, norm = update()
        ema_update(average, net, ema_decay, step)
        smooth = loss if step == 0 else torch.lerp(smooth, loss, 0.02)
        step += 1
        bar.update()
        # Log
        logging = step % log_every == 0
        saving = step % save_every == 0 or step == steps
        if run.rank == 0 and (logging or saving):
            check_finite(step, dict(norm=norm))
        if run.rank == 0 and logging:
            row = dict(step=step, loss=round(smooth.item(), 4), norm=round(norm.item(), 4))
            bar.set_postfix(row, refresh=False)
            log.write(row)
    bar.close()
    end_run()
