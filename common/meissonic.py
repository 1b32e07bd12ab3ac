"""
Meissonic (arXiv 2410.08261), text to image at 1024 pixels: its transformer; its tokenizer is
`Tokenizer` under other names. Monetico is the same at 512 pixels, without the halving of the grid.

    cond = (words (B, 77, C), pooled (B, D), micro (B, 6))
    ids or probabilities on 64x64 places -> embed (B, 4096, D) -> features (B, 1024, D) on 32x32
                                         -> logits (B, 4096, V)
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.maskgen import (JOINT, QKV, Joint, JointMDM, RMSNorm, adapt, attend, block_names,
                            published_name, sinusoid)
from common.published import count_numbers, fill, read_published, seeded, shape_of
from tokenizer import Tokenizer

SIZE = dict(V=8192, D=1024, n_joint=14, n_single=28, n_head=8, grid=64, T=77, C=1024,
            axes=(16, 56, 56), pool=2)

VQ_SIZE = dict(image_size=1024, ch=128, ch_mult='1,2,2,4,6', n_res=2, n_codes=8192, code_dim=64,
               mid=2, up=3, z=64, groups=32, stem=128, unit_range=True)

WAVES = 256        # numbers in which the timestep and each micro-condition is embedded


# -----------------------------------------------------------------------------
# The transformer

def rope_table(side, T, axes):
    """Cosines and sines (2, T + side^2, sum(axes)) for `rotate`. A text token stands at (0, 0, 0), an
    image token at (0, row, column); on an axis of size n pair m turns by position 10000^(-2 m / n)."""
    place = torch.arange(side, dtype=torch.float64, device='cpu')
    rows = F.pad(place.repeat_interleave(side), (T, 0))        # (T + side^2,)
    columns = F.pad(place.repeat(side), (T, 0))
    angles = []
    for position, n in zip((0 * rows, rows, columns), axes):
        m = torch.arange(n // 2, dtype=torch.float64, device='cpu')
        angles.append(position[:, None] / 10000 ** (2 * m / n))      # (T + side^2, n / 2)
    angle = torch.cat(angles, 1).repeat_interleave(2, 1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def without_bias(columns, rows):
    return nn.Linear(columns, rows, bias=False)


def two_layers(width, D, bias=True):
    return nn.Sequential(nn.Linear(width, D, bias), nn.SiLU(), nn.Linear(D, D, bias))


class Single(nn.Module):
    """Flux's single-stream block, called like `Joint`: attention and MLP side by side on [text;
    image]."""

    def __init__(self, D, n_head):
        super().__init__()
        self.mod = nn.Linear(D, 3 * D)
        self.qkv = QKV(D, n_head, qk_norm=True)
        self.mlp = nn.Linear(D, 4 * D)
        self.out = nn.Linear(5 * D, D)

    def forward(self, text, image, t, rope):
        h = torch.cat([text, image], 1)                        # (B, T + L, D)
        shift, scale, gate = self.mod(F.silu(t))[:, None].chunk(3, -1)
        a = adapt(h, shift, scale)
        q, k, v = self.qkv(a)
        attention = attend(q, k, v, rope)                      # (B, T + L, D)
        hidden = F.gelu(self.mlp(a), approximate='tanh')       # (B, T + L, 4 D)
        h = h + gate * self.out(torch.cat([attention, hidden], -1))
        T = text.shape[1]
        return h[:, :T], h[:, T:]


class Meissonic(JointMDM):
    """Tokens on `grid` x `grid` places, halved inside where pool = 2. embed gives one embedding a
    token, L = N = grid^2; features has fewer, and the attribute `grid` is theirs: (rows, columns) =
    (grid / pool, grid / pool). micro (B, 6) is width, height, top, left, score, and the timestep as
    the caller passes it: the steps left in sampling, 0 in Di[M]O. Raises ValueError."""

    law = 'meissonic'                                          # the sampler it was published with
    n_micro = 6

    def __init__(self, V, D, n_joint, n_single, n_head, grid=64, T=77, C=1024, axes=(16, 56, 56),
                 pool=2):
        super().__init__(grid ** 2, V, D, T, C, D)
        self.config = dict(V=V, D=D, n_joint=n_joint, n_single=n_single, n_head=n_head, grid=grid,
                           T=T, C=C, axes=tuple(axes), pool=pool)
        if len(axes) != 3 or sum(axes) != D // n_head or any(n % 2 for n in axes):
            raise ValueError(f'axes {tuple(axes)}: expected three even numbers with the sum '
                             f'{D // n_head}, the width of a head')
        if grid < 1 or grid % pool:
            raise ValueError(f'grid {grid} (--teacher_grid): expected a multiple of {pool}, which divides '
                             'it inside')
        self.pool = pool
        self.grid = (grid // pool, grid // pool)
        self.input_proj = nn.Sequential(RMSNorm(D), without_bias(D, D))
        if pool > 1:
            self.down = nn.Sequential(RMSNorm(D), without_bias(pool ** 2 * D, D))
            self.up = nn.Sequential(RMSNorm(D), without_bias(D, pool ** 2 * D))
        self.first = nn.Sequential(RMSNorm(D), without_bias(D, D))
        self.text_norm = RMSNorm(D)
        self.cond_mlp = two_layers(D + 5 * WAVES, D, bias=False)
        self.time_mlp = two_layers(WAVES, D)
        self.pooled_mlp = two_layers(D, D)
        self.blocks = nn.ModuleList()
        for _ in range(n_joint):
            self.blocks.append(Joint(D, n_head, qk_norm=True))
        for _ in range(n_single):
            self.blocks.append(Single(D, n_head))
        self.last = nn.Sequential(RMSNorm(D), without_bias(D, D))
        self.head = nn.Sequential(without_bias(D, D), RMSNorm(D), without_bias(D, V))
        self.rope = rope_table(self.grid[0], T, axes)
        self.init_weights()

    def text(self, words):
        return self.text_norm(self.text_proj(words))

    def enter(self, emb):
        """Embeddings (B, N, D) -> (B, rows * columns, D): a 2x2 convolution with stride 2, as a matrix
        on patches, then a projection."""
        if self.pool > 1:
            norm, convolution = self.down
            rows, columns = self.grid
            h = norm(emb).unflatten(1, (rows, self.pool, columns, self.pool))
            patches = h.transpose(2, 3).flatten(3).flatten(1, 2)     # (B, rows * columns, 4 D)
            emb = convolution(patches)
        return self.first(emb)

    def modulation(self, cond):
        """Pooled text, micro-conditions and timestep -> t (B, D)."""
        dtype = self.table.dtype
        pooled, micro = cond[1], cond[2].float()               # bf16 counts to 256
        sizes = sinusoid(micro[:, :5], WAVES, period=10000, cosine_first=True)     # (B, 5, 256)
        time = sinusoid(1000 * micro[:, 5], WAVES, period=10000, cosine_first=True)
        numbers = torch.cat([pooled, sizes.flatten(1)], 1)
        text = self.pooled_mlp(self.cond_mlp(numbers.to(dtype)))
        return self.time_mlp(time.to(dtype)) + text

    def logits(self, h, cond):
        """Hidden states (B, rows * columns, D) -> (B, N, V): a projection, a transposed 2x2
        convolution with stride 2, the output."""
        h = self.last(h)
        if self.pool > 1:
            rows, columns = self.grid
            patches = self.up(h).view(len(h), rows, columns, self.pool, self.pool, self.D)
            h = patches.transpose(2, 3).reshape(len(h), self.N, self.D)
        return self.head(h)

    def embedding_parameters(self):
        """What Di[M]O keeps frozen: the published embed.* and mlm_layer.*."""
        parts = nn.ModuleList([self.tok_emb, self.input_proj, self.head])
        return list(parts.parameters())


# -----------------------------------------------------------------------------
# Published names

MEISSONIC = [  # ours, theirs
    ('tok_emb.', 'embed.embeddings.'),                         # rows: codes, unused, the mask last
    ('input_proj.0.', 'embed.layer_norm.'),
    ('input_proj.1.', 'embed.conv.'),                          # 1x1
    ('down.0.', 'down_block.downsample.norm.'),
    ('down.1.', 'down_block.downsample.conv.'),                # 2x2
    ('first.0.', 'project_to_hidden_norm.'),
    ('first.1.', 'project_to_hidden.'),
    ('text_proj.', 'context_embedder.'),
    ('text_norm.', 'encoder_proj_layer_norm.'),
    ('cond_mlp.0.', 'cond_embed.linear_1.'),
    ('cond_mlp.2.', 'cond_embed.linear_2.'),
    ('time_mlp.0.', 'time_text_embed.timestep_embedder.linear_1.'),
    ('time_mlp.2.', 'time_text_embed.timestep_embedder.linear_2.'),
    ('pooled_mlp.0.', 'time_text_embed.text_embedder.linear_1.'),
    ('pooled_mlp.2.', 'time_text_embed.text_embedder.linear_2.'),
    ('last.0.', 'project_from_hidden_norm.'),
    ('last.1.', 'project_from_hidden.'),
    ('up.0.', 'up_block.upsample.norm.'),
    ('up.1.', 'up_block.upsample.conv.'),                      # 2x2, transposed
    ('head.0.', 'mlm_layer.conv1.'),                           # 1x1
    ('head.1.', 'mlm_layer.layer_norm.'),
    ('head.2.', 'mlm_layer.conv2.')]                           # 1x1

SINGLE = [  # a single block
    ('mod.', 'norm.linear.'),
    ('qkv.q.', 'attn.to_q.'),
    ('qkv.k.', 'attn.to_k.'),
    ('qkv.v.', 'attn.to_v.'),
    ('qkv.norm_q.', 'attn.norm_q.'),
    ('qkv.norm_k.', 'attn.norm_k.'),
    ('mlp.', 'proj_mlp.'),
    ('out.', 'proj_out.')]

VQ = [  # the tokenizer: parts of names, ours, theirs (diffusers'); {} is a number
    ('codebook.', 'quantize.embedding.'),
    ('coder.mid.block.{}.', 'coder.mid_block.resnets.{}.'),
    ('encoder.down.{}.block.{}.', 'encoder.down_blocks.{}.resnets.{}.'),
    ('encoder.down.{}.downsample.', 'encoder.down_blocks.{}.downsamplers.0.conv.'),
    ('decoder.up.{}.block.{}.', 'decoder.up_blocks.{}.resnets.{}.'),       # both deepest first
    ('decoder.up.{}.upsample.', 'decoder.up_blocks.{}.upsamplers.0.conv.'),
    ('nin_shortcut.', 'conv_shortcut.'),
    ('coder.norm_out.', 'coder.conv_norm_out.')]


DOWN = 'down_block.downsample.conv.weight'
UP = 'up_block.upsample.conv.weight'


def meissonic_names(n_joint, n_single):
    joint = block_names(JOINT, 'blocks', 'transformer_blocks', n_joint)
    single = block_names(SINGLE, 'blocks', 'single_transformer_blocks', n_single, first=n_joint)
    return dict(MEISSONIC + joint + single)


def vq_name(key):
    """Our parameter name of the tokenizer -> the published one."""
    for ours, theirs in VQ:
        pattern = re.escape(ours).replace(r'\{\}', r'(\d+)')
        found = re.search(pattern, key)
        if found:
            key = key[:found.start()] + theirs.format(*found.groups()) + key[found.end():]
    return key


# -----------------------------------------------------------------------------
# Published files

def published_meissonic(path, n_head=None, grid=0, axes=None):
    """Meissonic or Monetico from its file, its folder, or the dict that it holds; 'random' is the
    published size with random weights. Sizes are read off the shapes, n_head too; they do not tell
    the grid (tokens a side) and the rotary axes, which are as published unless given. Raises
    ValueError, FileNotFoundError."""
    if path == 'random':
        return seeded(Meissonic, SIZE)
    weights, name = read_published(path, 'transformer', ('embed.embeddings.weight',))
    w = dict(weights)
    config = meissonic_config(w, name, n_head, grid, axes)
    V, D = config['V'], config['D']
    if config['pool'] == 2:
        flatten_pooling(w)
    for key in ('embed.conv.weight', 'mlm_layer.conv1.weight', 'mlm_layer.conv2.weight'):
        w[key] = w[key].flatten(1)                             # a 1x1 convolution as a matrix
    table = w['embed.embeddings.weight']
    w['embed.embeddings.weight'] = torch.cat([table[:V], table[-1:]])
    w['null_words'] = torch.zeros(1, config['T'], config['C'])       # not in the file
    w['null_pooled'] = torch.zeros(1, D)
    with torch.device('meta'):
        model = Meissonic(**config)
    names = meissonic_names(config['n_joint'], config['n_single'])

    def rename(key):
        return published_name(key, names)
    return fill(model, w, rename, name)


def meissonic_config(w, name, n_head, grid, axes):
    """The sizes of a Meissonic file."""
    def size(key, *wanted):
        return shape_of(w, name, 'a meissonic transformer', key, *wanted)
    rows, D = size('embed.embeddings.weight', 0, 0)
    V = size('mlm_layer.conv2.weight', 0, D, 1, 1)[0]
    C = size('context_embedder.weight', D, 0)[1]
    size('embed.conv.weight', D, D, 1, 1)
    size('mlm_layer.conv1.weight', D, D, 1, 1)
    head_width = size('transformer_blocks.0.attn.norm_q.weight', 0)[0]
    pool = 1
    if DOWN in w or UP in w:
        pool = 2
        size(DOWN, D, D, 2, 2)                                 # (out, in, row, column)
        size(UP, D, D, 2, 2)                                   # transposed: (in, out, row, column)
    if rows <= V:
        raise ValueError(f'{name}: embed.embeddings.weight has {rows} rows, expected the {V} codes '
                         'and a mask')
    n_head = n_head or D // head_width
    if n_head * head_width != D:
        raise ValueError(f'{name}: width {D} does not fall into {n_head} heads of {head_width}, '
                         f'the length of attn.norm_q.weight; leave out n_head (--teacher_heads)')
    grid = grid or (64 if pool == 2 else 32)
    if axes is None:                                           # 16, 56, 56 of 128, and in proportion
        side = 2 * (7 * head_width // 32)
        axes = (head_width - 2 * side, side, side)
    if sum(axes) != head_width:
        raise ValueError(f'{name}: axes {tuple(axes)}, expected the sum {head_width}, the length '
                         'of attn.norm_q.weight; give axes=...')
    n_joint = count_numbers(w, r'transformer_blocks\.(\d+)\.')
    n_single = count_numbers(w, r'single_transformer_blocks\.(\d+)\.')
    return dict(V=V, D=D, n_joint=n_joint, n_single=n_single, n_head=n_head, grid=grid,
                T=SIZE['T'], C=C, axes=axes, pool=pool)


def flatten_pooling(w):
    """The 2x2 convolutions as matrices on patches (row, column, channel)."""
    w[DOWN] = w[DOWN].permute(0, 2, 3, 1).flatten(1)           # (out, patch)
    w[UP] = w[UP].permute(2, 3, 1, 0).flatten(0, 2)            # (patch, in)


def published_meissonic_vq(path, grid=64):
    """Meissonic's tokenizer from its file, its folder, or the dict that it holds; 'random' is the
    published size with random weights. Sizes are read off the shapes; they do not tell the grid
    (tokens a side) of an image. Raises ValueError, FileNotFoundError."""
    if path == 'random':
        return seeded(Tokenizer, VQ_SIZE)
    w, name = read_published(path, 'vqvae', ('encoder.conv_in.weight',))
    with torch.device('meta'):
        tokenizer = Tokenizer(**vq_config(w, name, grid))
    return fill(tokenizer, w, vq_name, name)


def vq_config(w, name, grid):
    """The sizes of a tokenizer file."""
    def size(key, *wanted):
        return shape_of(w, name, 'a meissonic tokenizer', key, *wanted)
    stem = size('encoder.conv_in.weight', 0, 3, 3, 3)[0]
    depth = max(1, count_numbers(w, r'encoder\.down_blocks\.(\d+)\.'))
    widths = []
    for i in range(depth):
        widths.append(size(f'encoder.down_blocks.{i}.resnets.0.conv2.weight', 0, 0, 3, 3)[0])
    for width in (stem, *widths):
        if width % 32:
            raise ValueError(f'{name}: encoder.conv_in.weight and encoder.down_blocks have '
                             f'{[stem, *widths]} channels, expected multiples of 32. Is this the '
                             'right file?')
    ch = math.gcd(*widths)
    z = size('encoder.conv_out.weight', 0, widths[-1], 3, 3)[0]
    n_codes, code_dim = size('quantize.embedding.weight', 0, 0)
    n_res = count_numbers(w, r'encoder\.down_blocks\.0\.resnets\.(\d+)\.')
    mid = count_numbers(w, r'encoder\.mid_block\.resnets\.(\d+)\.')
    up = count_numbers(w, r'decoder\.up_blocks\.0\.resnets\.(\d+)\.')
    ch_mult = ','.join(str(width // ch) for width in widths)
    return dict(image_size=grid << depth - 1, ch=ch, ch_mult=ch_mult, n_res=n_res, n_codes=n_codes,
                code_dim=code_dim, mid=mid, up=up, z=z, groups=32, stem=stem, unit_range=True)
