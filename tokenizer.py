"""
Images <-> tokens: the VQ and bit autoencoder, with soft decoding.

    images (B, 3, H, W) in [-1, 1] -> encode -> ids (B, N);  ids or probabilities (B, N, V) -> decode -> images

Everything that touches pixels lives here, so that the rest of the method only sees ids and logits. Published tokenizers
(MaskGIT's VQGAN, MaskBit's) are settings of the same autoencoder. Compared with their trainers this one leaves out
LPIPS and the discriminator; at 32x32 an L1 + L2 loss is enough.

$ python tokenizer.py                          # shapes world, about 3 minutes on 2 CPU cores -> out/tokenizer.pt
$ python tokenizer.py --data=my_images         # your folder: sub-folders are classes
$ torchrun --nproc_per_node=8 tokenizer.py --data=my_images --image_size=64 --batch_size=512
Expected: reconstruction error below 0.02 (mean absolute, images in [-1, 1]) and more than 90 % of the codes in use.
"""
import copy
import hashlib
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# I/O
data = 'shapes'        # 'shapes', 'shapes-open' (background left open: the stress test), or a folder of class folders or of captioned images
out_dir = 'out'        # tokenizer.pt, its log and its pictures go here
resume = False         # continue from out_dir/tokenizer.pt to the same bits
overwrite = False      # a tokenizer.pt that is there may be replaced by a new run
seed = 0               # every random number of the run follows from it
log_every = 20         # steps between log lines
save_every = 200       # steps between checkpoints and pictures
# network
image_size = 32        # pixels; images are resized (shorter side) and centre-cropped to it; the world: multiples of 32
ch = 16                # channels at full resolution; VQGAN 128
ch_mult = '1,2,4'      # channel multiplier of each level, each but the last halves the size; VQGAN 1,1,2,2,4
n_res = 1              # residual blocks per level; VQGAN 2
n_codes = 128          # codebook size V; VQGAN 1024
code_dim = 8           # numbers per code
# training
steps = 1200           # updates; with half of them the squared error is three to five times as large
warmup_free = 100      # first updates without quantisation, after which the codebook is set from encoder outputs
batch_size = 64        # images per update, all processes together
micro_batch = 0        # images per forward pass on one device, 0 = all; lower it to save memory
lr = 2e-3              # AdamW, falls to a tenth along a cosine
apart = 8.0            # codes nearer to a busier one than this many mean squared errors of quantisation move on
commitment = 0.25      # weight of the commitment loss; VQ-VAE .25
# system
compile = False        # torch.compile the network
bench = False          # time 20 steps and stop

LIMITS = dict(         # the least value
    log_every=1, save_every=1, image_size=1, ch=2, n_res=1, n_codes=2, code_dim=1, steps=1,
    warmup_free=0, batch_size=1, micro_batch=0, lr=0, apart=0)
# -----------------------------------------------------------------------------
# Parts of the autoencoder

def bit_rows(k):
    """The 2^k codes of k bits as rows of -1/+1 (2^k, k), least significant bit first."""
    codes = torch.arange(2 ** k, device='cpu')[:, None]
    places = torch.arange(k, device='cpu')
    return (codes >> places & 1) * 2.0 - 1


class ResBlock(nn.Module):
    """Two convolutions with a residual; `plain` (MaskBit): they have no bias, and where channels
    change the shortcut acts on the *output* of the second, so that the input does not reach the
    sum."""

    def __init__(self, c_in, c_out, groups, plain):
        super().__init__()
        self.late = plain and c_in != c_out
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=not plain)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=not plain)
        self.nin_shortcut = nn.Identity()
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out if plain else c_in, c_out, 1, bias=not plain)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(h if self.late else x) + h


class Attention(nn.Module):
    """One head over the positions of a feature map (B, C, H, W), with a residual."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        h = self.norm(x)
        q = self.q(h).flatten(2).transpose(1, 2)               # (B, H W, C)
        k = self.k(h).flatten(2).transpose(1, 2)
        v = self.v(h).flatten(2).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """n residual blocks from c_in to c channels, the first `attend` of them followed by attention,
    then perhaps a convolution that changes the resolution."""

    def __init__(self, c_in, c, n, groups, plain, attend, resample=''):
        super().__init__()
        self.block = nn.ModuleList()
        for k in range(n):
            self.block.append(ResBlock(c if k else c_in, c, groups, plain))
        self.attn = nn.ModuleList()
        for k in range(n):
            self.attn.append(Attention(c, groups) if k < attend else nn.Identity())
        if resample == 'down':
            self.downsample = nn.Conv2d(c, c, 3, stride=2)
        if resample == 'up':
            self.upsample = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        if hasattr(self, 'downsample'):
            h = self.downsample(F.pad(h, (0, 1, 0, 1)))        # one column right, one row below
        if hasattr(self, 'upsample'):
            h = self.upsample(F.interpolate(h, scale_factor=2.0, mode='nearest'))
        return h


# -----------------------------------------------------------------------------
# The autoencoder: our small one, the taming VQGAN of MaskGIT and MaskBit's bit tokenizer are settings of it

class Tokenizer(nn.Module):
    """Autoencoder: images (B, 3, H, W) in [-1, 1] <-> ids (B, N), N = S * grid * grid, row by row.

    A code is a learnt row of `code_dim` numbers. With S > 0 it is MaskBit's: `code_dim` bits -1/+1,
    and S codes stand side by side at each place of the grid (the first holds the low bits). `mid`
    residual blocks stand in the middle, `up` in each level of the decoder (0: n_res), z channels
    between encoder and codes (0: the width there); `attention` names the levels that have it, as in
    '4,mid'; the first convolution is `stem` wide (0: ch). With `unit_range` the weights see images
    in [0, 1], as MaskBit's always do.
    """

    def __init__(self, image_size, ch, ch_mult, n_res, n_codes, code_dim, S=0, mid=0, up=0, z=0, attention='',
                 groups=0, stem=0, unit_range=False):
        super().__init__()
        self.config = dict(image_size=image_size, ch=ch, ch_mult=ch_mult, n_res=n_res, n_codes=n_codes,
                           code_dim=code_dim, S=S, mid=mid, up=up, z=z, attention=attention, groups=groups)
        if stem or unit_range:                                 # else as in the checkpoints of all others
            self.config |= dict(stem=stem, unit_range=unit_range)
        widths = level_widths(ch, ch_mult)
        cell = 2 ** (len(widths) - 1)                          # pixels of a place on the grid
        if image_size < 1 or image_size % cell:
            raise ValueError(f'image_size {image_size} is not a multiple of {cell}, which the '
                             f'{len(widths)} levels of ch_mult {ch_mult} need')
        self.V, self.S = n_codes, max(1, S)
        self.grid = image_size // cell
        self.source = None                                     # of a published one: where it is
        self.N = self.S * self.grid ** 2
        self.batch = max(1, min(256, 2 ** 21 // image_size ** 2))    # images that fit one pass: 32 at 256x256
        plain = S > 0
        self.unit_range = plain or unit_range
        groups = groups or min(32, ch // 2)
        if any(width % groups for width in (ch, *widths)):
            raise ValueError(f'ch {ch} and ch_mult {ch_mult} give levels of {widths} channels, which do not fall into '
                             f'{groups} groups; try an even ch')
        z = S * code_dim or z or widths[-1]
        attends = attention.split(',')
        self.encoder = make_encoder(widths, stem or ch, n_res, mid, z, groups, plain, attends)
        if plain:
            self.register_buffer('codes', bit_rows(code_dim))  # (V, code_dim)
            self.quant_conv = nn.Identity()
            self.post_quant_conv = nn.Identity()
        else:
            self.quant_conv = nn.Conv2d(z, code_dim, 1)
            self.codebook = nn.Embedding(n_codes, code_dim)
            self.post_quant_conv = nn.Conv2d(code_dim, z, 1)
        self.decoder = make_decoder(widths, up or n_res, mid, z, groups, plain, attends)

    @property
    def table(self):
        """The codes as the decoder sees them: (V, code_dim)."""
        return self.codes if self.config['S'] else self.codebook.weight

    def latents(self, images):
        """Images (B, 3, H, W) -> encoder outputs before quantisation (B, N, code_dim)."""
        if self.unit_range:
            images = (images + 1) / 2
        z = self.quant_conv(self.encoder(images))              # (B, S code_dim, grid, grid)
        z = z.flatten(2).transpose(1, 2)                       # (B, grid^2, S code_dim)
        return z.reshape(len(z), -1, self.config['code_dim'])

    def nearest(self, z):
        """z (..., code_dim) -> id of the nearest code (Euclidean), (...); for bits their signs, 0
        counting as -1."""
        if self.config['S']:
            places = torch.arange(z.shape[-1], device=z.device)
            return ((z > 0) << places).sum(-1)
        return nearest_row(z, self.codebook.weight)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1], H = W a multiple of the cell -> ids (B, N). Raises
        ValueError."""
        cell = self.config['image_size'] // self.grid
        if images.dim() != 4 or images.shape[2] != images.shape[3] or images.shape[2] % cell:
            raise ValueError(f'encode expects square images whose side is a multiple of {cell}, got '
                             f'{tuple(images.shape)}')
        return self.nearest(self.latents(images))

    def decode(self, x, captions=None):
        """Ids (B, N), or float probabilities (B, N, V), -> images (B, 3, H, W), nominally in
        [-1, 1], not clamped. Probabilities decode to the image of the *expected* code and are
        differentiable; a one-hot gives exactly the hard image. N may be that of any square
        image. `captions` are for text-guided decoders and unused here. Raises ValueError for
        other shapes."""
        self.check_shape(x)
        if x.is_floating_point():
            # E[e] = p @ codes, Soft-Di[M]O (arXiv 2509.22925) Eq. 3 with the decoder's table
            return self.decode_latents(x.to(self.table.dtype) @ self.table)
        return self.decode_latents(F.embedding(x, self.table))

    def check_shape(self, x):
        soft = x.is_floating_point()
        fits = x.dim() == 2 + soft
        if fits and soft:
            fits = x.shape[2] == self.V
        if fits:
            side = math.isqrt(x.shape[1] // self.S)
            fits = x.shape[1] == self.S * side ** 2
        if not fits:
            raise ValueError(f'decode expects ids (B, {self.N}) or probabilities (B, {self.N}, {self.V}), '
                             f'got {tuple(x.shape)}')

    def decode_latents(self, z, captions=None):
        """(B, N, code_dim) -> images (B, 3, H, W), not clamped."""
        side = math.isqrt(z.shape[1] // self.S)
        z = z.reshape(len(z), side, side, -1).permute(0, 3, 1, 2)    # (B, S code_dim, grid, grid)
        weights = self.decoder.conv_in.weight
        images = self.decoder(self.post_quant_conv(z.to(weights.dtype)))
        if weights.dtype != self.table.dtype:                  # of `decoder_in`
            images = images.to(self.table.dtype)
        return images * 2 - 1 if self.unit_range else images

    def decoder_in(self, dtype):
        """The same tokenizer to decode with in another precision, channels last, which convolutions
        like best: in bfloat16 two to five times as fast on a CPU. Gradients pass as before; what
        goes in and comes out has the precision of the codes."""
        other = copy.deepcopy(self)
        other.encoder = None
        other.post_quant_conv.to(dtype)
        other.decoder.to(dtype, memory_format=torch.channels_last)
        return other

    def forward(self, images, quantise=True):
        """One training pass -> (reconstruction, latents z, quantised q): q = codebook[nearest(z)],
        and the decoder sees z + stopgrad(q - z), the straight-through estimator of VQ-VAE (arXiv
        1711.00937 Eq. 3)."""
        z = self.latents(images)
        q = self.codebook(self.nearest(z)) if quantise else z
        return self.decode_latents(z + (q - z).detach()), z, q

    def digest(self):
        """What its tokens mean, in a word: hash of the weights."""
        return hash_of_weights(self.state_dict())

    def pack(self):
        """What a checkpoint stores: a small tokenizer itself, of a published one where it is."""
        return self.source or dict(args=self.config, net=self.state_dict())

    @classmethod
    def from_checkpoint(cls, saved, path=''):
        """Rebuild from what `pack` puts into every checkpoint of ours; `path` says where a
        published one is now. Raises ValueError, FileNotFoundError."""
        if 'kind' not in saved:
            tokenizer = cls(**saved['args'])
            tokenizer.load_state_dict(saved['net'])
            return tokenizer.eval().requires_grad_(False)
        if 'digest' not in saved:
            raise ValueError('a checkpoint names its tokenizer without a digest, so no file can be proved to be the '
                             'one that it was made with; make it anew')
        moved = '(a checkpoint names this tokenizer; if it moved: --tokenizer_path=...)'
        try:
            tokenizer = cls.from_pretrained(saved['kind'], path or saved['path'], saved['grid'], saved.get('S', 0),
                                            saved.get('n_head'))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f'{error} {moved}') from None
        if tokenizer.source['digest'] != saved['digest']:
            raise ValueError(f'{tokenizer.source["path"]}: other weights than this run was made with {moved}')
        return tokenizer

    @classmethod
    def from_pretrained(cls, kind, path, grid=0, S=0, n_head=None):
        """Published weights, kind maskgit (taming VQGAN), maskbit, maskgen (a TA-TiTok) or
        meissonic, from their file, from its folder, or from the dict that it holds; path 'random'
        is the published size with random weights. Sizes are read off the shapes. What they leave
        open is as released unless given: the grid of an image, MaskBit's S, TA-TiTok's n_head =
        (encoder, decoder). Errors: ValueError, FileNotFoundError, one line."""
        from common.teachers import published_tokenizer
        return published_tokenizer(kind, path, grid, S, n_head)


def distance_to_rows(z, table):
    """z (..., d) -> its squared distance from each row of the table (V, d), less |z|^2, which is the
    same for all of them: (..., V)."""
    with torch.autocast(z.device.type, enabled=False):         # bf16 would choose another code for a third of them
        return table.square().sum(1) - 2 * z.to(table.dtype) @ table.T


def nearest_row(z, table):
    """z (..., d) -> number of the nearest row (Euclidean) of the table (V, d), (...)."""
    return distance_to_rows(z, table).argmin(-1)


def hash_of_weights(weights):
    """A digest of {name: tensor}."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def level_widths(ch, ch_mult):
    """'1,2,4' -> channels of each level. Raises ValueError."""
    factors = ch_mult.split(',')
    if not all(factor.strip().isdecimal() and int(factor) > 0 for factor in factors):
        raise ValueError(f'ch_mult {ch_mult!r} has a level without channels; expected numbers from 1, as in 1,2,4')
    return [ch * int(factor) for factor in factors]


def make_encoder(widths, stem, n_res, mid, z, groups, plain, attention):
    """Images (B, 3, H, W) -> (B, z, grid, grid): a level per width, full resolution first."""
    last, top = len(widths) - 1, widths[-1]
    conv_in = nn.Conv2d(3, stem, 3, padding=1, bias=not plain)
    levels, c_in = [], stem
    for i, width in enumerate(widths):
        attend = n_res if str(i) in attention else 0
        resample = 'down' if i < last else ''
        levels.append(Level(c_in, width, n_res, groups, plain, attend, resample))
        c_in = width
    middle = Level(top, top, mid, groups, plain, 1 if 'mid' in attention else 0)
    norm_out = nn.GroupNorm(groups, top, eps=1e-6)
    kernel = 1 if plain else 3
    conv_out = nn.Conv2d(top, z, kernel, padding=kernel // 2)
    return nn.Sequential(OrderedDict(conv_in=conv_in, down=nn.Sequential(*levels), mid=middle,
                                     norm_out=norm_out, act=nn.SiLU(), conv_out=conv_out))


def make_decoder(widths, n_res, mid, z, groups, plain, attention):
    """(B, z, grid, grid) -> images (B, 3, H, W): a level per width, the deepest first."""
    top = widths[-1]
    conv_in = nn.Conv2d(z, top, 3, padding=1)
    middle = Level(top, top, mid, groups, plain, 1 if 'mid' in attention else 0)
    levels, c_in = [], top
    for i, width in reversed(list(enumerate(widths))):
        attend = n_res if str(i) in attention else 0
        resample = 'up' if i else ''
        levels.append(Level(c_in, width, n_res, groups, plain, attend, resample))
        c_in = width
    norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
    conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
    return nn.Sequential(OrderedDict(conv_in=conv_in, mid=middle, up=nn.Sequential(*levels),
                                     norm_out=norm_out, act=nn.SiLU(), conv_out=conv_out))


def spread_out(z, k, rng, taken, near=0.0):
    """k rows of z (M, d), each drawn with probability proportional to its squared distance from
    those already drawn and from taken (K, d), K >= 0 (k-means++, Arthur & Vassilvitskii 2007), none
    below `near`: codes for rare patches too, not just for the background."""
    chosen = taken
    if len(taken) == 0:
        chosen = z[torch.randint(len(z), (1,), generator=rng)]
    distance = torch.cdist(z, chosen).square().amin(1)
    while len(chosen) < len(taken) + k:
        chances = distance * (distance > near) + 1e-12
        row = z[torch.multinomial(chances, 1, generator=rng)]
        distance = torch.minimum(distance, (z - row).square().sum(1))
        chosen = torch.cat([chosen, row])
    return chosen[len(taken):]


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    import os

    from common.files import (Log, check_origin, claim, load_resumed, restore, restore_optimizers, resumes,
                              save_checkpoint)
    from common.images import decode_images, encode_images, open_data
    from common.pictures import save_grid
    from common.run import (Stop, check_finite, configure, cosine_law, end_run, micro_rng, millions,
                            progress, report_bench, rng_for, same_weights, start_run, sum_over_processes, take_step)

    config = configure(globals())
    run = start_run(batch_size, micro_batch)
    out = os.path.join(out_dir, 'tokenizer.pt')
    if not bench:
        claim(out, resume or overwrite)
    source = open_data(data, image_size, out_dir=out_dir)
    origin = dict(data=source.digest())
    free_steps = max(1, min(warmup_free, steps // 2))          # short runs get a codebook too

    # Build the network and its optimizer
    torch.manual_seed(seed)
    net = Tokenizer(image_size, ch, ch_mult, n_res, n_codes, code_dim).to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4,
                                  fused=run.device.type == 'cuda')
    usage, step = torch.zeros(n_codes, device=run.device), 0
    if resumes(resume, out):
        state = load_resumed(out, 'tokenizer', config)
        check_origin(out, state, origin)
        restore(net, state['net'], out, 'net')
        restore_optimizers(dict(net=[optimizer]), [state['optimizer']], out)
        usage, step = state['usage'].to(run.device), state['step']
    same_weights(net)
    forward = torch.compile(net) if compile else net

    def update():
        """One training step: gradients over the micro-batches, clip, AdamW -> mean |error|, vq
        loss, gradient norm."""
        for group in optimizer.param_groups:
            group['lr'] = lr * cosine_law(step, steps, warmup=50, floor=0.1)
        optimizer.zero_grad(set_to_none=False)
        for k in range(run.accumulate):
            rng = micro_rng(seed, step, k, run, device='cpu')
            index = torch.randint(source.limit, (run.micro,), generator=rng)
            x = source.batch(index.tolist())[0].to(run.device)
            with run.autocast:
                y, z, q = forward(x, quantise=step >= free_steps)
            y, z, q = y.float(), z.float(), q.float()          # losses in float32
            # VQ-VAE (arXiv 1711.00937) Eq. 3: |sg[z] - e|^2 + commitment |z - sg[e]|^2
            codes_move = F.mse_loss(q, z.detach())
            latents_move = F.mse_loss(z, q.detach())
            vq = codes_move + commitment * latents_move
            loss = F.l1_loss(y, x) + F.mse_loss(y, x) + vq
            loss.backward()
            chosen = net.nearest(z.detach()).flatten()
            usage.add_(torch.bincount(chosen, minlength=n_codes))
        norm = take_step(net, [optimizer], run, clip=1.0)
        return (y - x).detach().abs().mean(), vq.detach(), norm

    def renew_codes():
        """Set the codebook from fresh encoder outputs or, later, move those codes there which no
        patch has chosen lately or which lie beside a busier one, so that nothing but noise decides
        between the two."""
        sum_over_processes(usage)
        rng, codes = rng_for(seed, step, -1), net.codebook.weight.data
        index = torch.randint(source.length, (min(256, source.length),), generator=rng)
        x = source.batch(index.tolist())[0]
        with torch.no_grad():
            parts = [net.latents(part.to(run.device)).float() for part in x.split(net.batch)]
            z = torch.cat(parts).flatten(0, 1)                 # (patches, code_dim)
        check_finite(step, dict(norm=z.norm()))
        if step == free_steps:
            near, dead = 0.0, torch.ones(n_codes, dtype=torch.bool, device=run.device)
        else:
            error = z - codes[net.nearest(z)]
            near = apart * error.square().sum(1).mean().item()
            close = torch.cdist(codes, codes).square() < near
            beside_busier = (close & (usage > usage[:, None])).any(1)
            dead = (usage < 1) | beside_busier
        if dead.any():
            alive = codes[~dead].cpu()
            fresh = spread_out(z.cpu(), int(dead.sum()), rng, alive, near)
            codes[dead] = fresh.to(run.device)
            same_weights(net)                                  # equal but for a last bit, which can grow
        usage.zero_()

    # Print the plan
    if run.rank == 0:
        print(f'{millions(net):.2f} M parameters, {source.length} images, {net.N} tokens of {n_codes} codes')
        print(f'{steps} updates of {batch_size} = {run.world} x {run.accumulate} x {run.micro}')
    if bench:
        report_bench(update, batch_size, run)
        raise SystemExit
    log = Log(out, step) if run.rank == 0 else None
    fixed, _ = source.batch(source.examples(32))

    bar, stop = progress(steps, 'tokenizer', step), Stop()
    while True:
        # Save, show, stop
        ending = step >= steps or stop.now(step, run.device)
        if run.world > 1 and (step % save_every == 0 or ending):     # an equal share for each process
            sum_over_processes(usage)
            usage /= run.world
        if run.rank == 0 and (step % save_every == 0 or ending):
            if step:
                state = dict(stage='tokenizer', step=step, config=config, origin=origin, args=net.config, usage=usage)
                state.update(net=net.state_dict(), optimizer=optimizer.state_dict())
                save_checkpoint(out, state)
            with torch.no_grad():
                again = net.decode(net.encode(fixed.to(run.device))).cpu()
            save_grid(f'{out_dir}/tokenizer.png', torch.stack([fixed, again], 1).flatten(0, 1))
        if ending:
            break
        # -------------------------------------------------------------------------
        error, vq, norm = update()
        step += 1
        bar.update()
        # Log
        logging = step % log_every == 0
        saving = step % save_every == 0 or step == steps
        if run.rank == 0 and (logging or saving):
            check_finite(step, dict(norm=norm))
        if run.rank == 0 and logging:
            row = dict(step=step, error=round(error.item(), 5), vq=round(vq.item(), 5))
            row.update(norm=round(norm.item(), 4), used=int((usage > 0).sum()))
            bar.set_postfix(row, refresh=False)
            log.write(row)
        # Renew the codes
        if step == free_steps or step > free_steps and (step % 50 == 0 or step == steps):
            renew_codes()
    bar.close()

    # Measure
    if run.rank == 0 and step >= steps:
        held, captions = source.batch(source.readable(source.examples(2000), 2000))
        ids = encode_images(net, held)
        again = decode_images(net, ids, captions)
        counts = torch.bincount(ids.flatten().cpu(), minlength=n_codes)
        share = counts.float() / ids.numel()
        error = (again - held).abs().mean()
        perplexity = torch.special.entr(share).sum().exp()
        if source.bad:
            print(f'{len(source.bad)} unreadable files were skipped')
        print(f'{len(held)} images: mean absolute error {error:.4f}, codes used {(counts > 0).sum()} of {n_codes}, '
              f'perplexity {perplexity:.1f} -> {out}')
    end_run()
