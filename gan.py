"""
Stage 2a, Soft-Di[M]O (arXiv 2509.22925): refine the one-step generator with a GAN.

The generator's logits enter the frozen teacher as soft embeddings, so a discriminator of light heads
on the teacher's features sends gradients back to the generator; the Di[M]O surrogate stays on as the
regulariser. This is the first stage that sees data. There is no official code to compare with; left
out against other GANs on frozen features: R1 penalty, augmentation, batch statistics. One generator
pass serves all updates; one look of the teacher at real and fake serves both players. Our choice:
Muon on the heads' matrices, which learn the game first, alone; --through_pixels and --gan_ratio.

$ python gan.py                                         # after distill.py; 10 minutes on one CPU core
$ python gan.py --steps=20 --n_eval=200 --init=out/distill.pt --out_dir=out/smoke
$ python gan.py --relax=st --tau_soft=0.3 --gan_ratio=3 # where the entropy is high: D knows a soft embedding by its blur
$ torchrun --nproc_per_node=8 gan.py --init=out/maskbit/distill.pt --data=imagenet/train   # a published teacher
Expected (2 CPU cores, shapes world): the table that assets/RESULTS.md shows, printed at its end.
"""
import math
import os
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import brentq

from common.files import (Log, claim, load_checkpoint, load_resumed, note_unfinished, optimizer_states,
                          restore, restore_optimizers, resumes, save_checkpoint, settings_of)
from common.images import TokenData, decode_images, open_data, token_data
from common.metrics import Reference, final_table, frechet_distance, in_short, render, toy_features
from common.pictures import save_grid
from common.run import (Stop, check_finite, compile_blocks, configure, ema_update, end_run,
                        image_rngs, make_optimizers, micro_rng, millions, out_folder, progress,
                        rate_law, report_bench, rng_for, rounded, same_weights, set_rates, smoothed,
                        start_run, take_step)
from common.teachers import copy_of, load_teacher, same_origin, teacher_file
from model import (aux_loss, dimo_grad, guided_logits, jeffreys, teacher_sampler, one_step,
                   random_numbers, random_positions, relaxation_bias, relaxed, remask, student_sampler,
                   surrogate, teacher_passes, token_entropy)
from tokenizer import distance_to_rows, hash_of_weights

# -----------------------------------------------------------------------------
# I/O
init = ''              # generator to start from, '' = out_dir/distill.pt; any distill.pt, gan.pt or reward.pt
data = ''              # real images, '' = what the teacher was trained on, or a folder
flips = False          # mirrored real images too, as MaskGIT and MaskBit were trained
out_dir = ''           # gan.pt, log and pictures go here, '' = out/ or out/NAME of the teacher
teacher = 'ours'       # this and the next four: read from the generator's checkpoint unless given
teacher_path = ''      # file of a published teacher; random = random weights of its size, to time it
tokenizer_path = ''    # file of its tokenizer
teacher_heads = 0      # attention heads of a published teacher, which its file does not tell; 0 = as published
text_path = ''         # CLIP text encoder of maskgen, meissonic: folder (weights, word files) or hub id
prompts = ''           # file of prompts that these train on (.txt, .jsonl, .json, .csv), '' = captions of --data
teacher_grid = 0       # tokens a side of a Meissonic, which its file does not tell; 0 = as published
teacher_ckpt = ''      # another teacher of ours than the model.pt beside the generator
resume = False         # continue from out_dir/gan.pt to the same bits
overwrite = False      # a gan.pt that is there may be replaced by a new run
seed = 0               # every random number of the run follows from it
log_every = 50         # steps between log lines
save_every = 200       # steps between checkpoints, sample grids and distances of 500 images
n_eval = 2000          # images behind each row of the final table, a quarter where the sampler is slow
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
# GAN
relax = 'soft'         # what the discriminator sees of the logits: soft (the paper), gumbel or st (straight-through)
tau_soft = 1.0         # temperature of that relaxation; the paper's soft embedding has 1
through_pixels = False  # for real images: real and fake are decoded and encoded again before D sees them, as many codes
                       # look alike and it would win by differences that no pixel shows; not of MaskGen
w_gan = 2.0            # weight of the GAN term per image, in the surrogate's sum convention; paper 200 (MaskBit)
gan_ratio = 0.0        # above 0 w_gan is steered: in each micro-batch the GAN's gradient at the logits has this many
                       # times the norm of Di[M]O's
w_dimo = 1.0           # weight of the Di[M]O surrogate, 0 = GAN only
r_max = 0.5            # masked share of real and fake, r ~ U[0, r_max]; paper .95 best, 0 worst
hinge = False          # hinge losses; False = non-saturating, as in the paper
disc_lr = 3e-3         # Adam on the heads' convolutions and biases; must learn faster than the generator
disc_muon = 0.02       # Muon on the heads' matrices; 0 = Adam on everything
disc_warmup = 200      # steps of the discriminator alone before the first update, a third of the cost of an update
disc_width = 256       # width of a head, at most the teacher's
spectral = False       # spectral norm on the heads' linear layers (one power iteration per micro-batch)
# Di[M]O
steps = 1500           # generator updates; 600 are too few to show anything
batch_size = 32        # images per update, all processes together; paper 64
micro_batch = 0        # images per forward pass on one device, 0 = all; lower it to save memory
generator_lr = 5e-5    # Adam; paper 5e-7 on everything in the long MaskBit run
aux_lr = 1.25e-4       # Adam; the auxiliary model follows the generator; higher rates are too noisy
generator_muon = 0.0005  # Muon on the matrices of the trunk; 0 = Adam on everything, as in the paper
aux_muon = 0.0025      # the same for the auxiliary model
aux_momentum = 0.8     # its Muon's, as in distill.py
beta1 = 0.9            # Adam
beta2 = 0.99           # Adam; paper .999
weight_decay = 0.0     # paper .01 in the long MaskBit run
warmup = 50            # steps of linear warm-up; paper 100
cooldown = 0.8         # last share of the steps over which the rates fall to 5 %; paper 0
clip = 1.0             # largest gradient norm, each network, 0 = none; paper 1
r_init = 0.6           # this and the next three: what the generator was made for, read from its checkpoint
sigma_init = 0.1       # std of the noise on its token embeddings
tau = 1.0              # temperature of the one-step sample in training
tau_sample = 1.0       # the same in pictures and tables
beta = 0.0             # generalized Jeffreys: 0 forward KL, which covers modes; 1 reverse KL
cfg_scale = 1.0        # teacher guidance u + s (c - u) in the surrogate, 1 = none
p_full = 0.25          # share of re-maskings that hide everything; paper 0
p_near = 0.75          # share that shows 1 to N / 8 tokens; paper 0
schedule = 'arccos'    # law of the ratio of the others, none by default: arccos (MaskGIT) or cosine (Meissonic)
label_smoothing = 0.0  # in the auxiliary loss; released code .1
ema_decay = 0.995      # averaged generator, which is what gets sampled (below .985 for 600 steps); paper .9999
freeze_tables = True   # keep the embedding tables of generator and auxiliary at the teacher's
# the teacher in the final table
teacher_steps = 16     # steps of the teacher
teacher_cfg = 1.5      # guidance at the last step, rising from 1
teacher_gumbel = 8.0   # Gumbel temperature of the confidence, falling to 0
# system
compile = False        # torch.compile the blocks of the three networks
grad_checkpoint = False  # recompute the blocks in backward: less memory, a third more time
bench = False          # time 20 steps and stop
bias = False           # print the bias of the soft embedding beside its bound for teacher, init and gan.pt, and stop

# What --teacher=NAME changes: the paper's values (w_gan, r_max, rates of the long MaskBit run); steps is our guess.
# The paper's soft embedding stays. Where D is right in more than 90 % of the cases, as on MNIST at 2.4 nats a token, try
# relax='st', tau_soft=0.3, gan_ratio=3: a sampled token shows no blur.
RECIPES = {
    'maskgit': dict(
        flips=True, steps=30_000, batch_size=64, generator_lr=1e-5, aux_lr=1e-5,
        generator_muon=0.0, aux_muon=0.0, disc_muon=0.0, disc_lr=1e-4, r_max=0.95, w_gan=200.0,
        beta2=0.999, warmup=100, cooldown=0.0, beta=-0.2, cfg_scale=2.0, p_full=0.0, p_near=0.0,
        label_smoothing=0.1, ema_decay=0.9999, save_every=1000, teacher_steps=8, teacher_cfg=4.0,
        teacher_gumbel=4.5),
    'maskbit': dict(
        flips=True, steps=30_000, batch_size=64, generator_lr=5e-7, aux_lr=5e-7,
        generator_muon=0.0, aux_muon=0.0, disc_muon=0.0, disc_lr=1e-4, r_max=0.95, w_gan=200.0,
        weight_decay=0.01, beta2=0.999, warmup=100, cooldown=0.0, cfg_scale=2.0, p_full=0.0,
        p_near=0.0, label_smoothing=0.1, ema_decay=0.9999, save_every=1000, teacher_steps=64,
        teacher_cfg=8.1, teacher_gumbel=7.8),
    # text to image: the paper has Di[M]O and rewards there, no GAN; all of this is our choice
    'maskgen': dict(
        steps=10_000, batch_size=64, generator_lr=1e-6, aux_lr=1e-6, generator_muon=0.0,
        aux_muon=0.0, disc_muon=0.0, disc_lr=1e-4, r_max=0.95, w_gan=50.0, beta2=0.999, warmup=100,
        cooldown=0.0, cfg_scale=4.0, p_full=0.0, p_near=0.0, label_smoothing=0.1, ema_decay=0.9999,
        save_every=1000, teacher_steps=16, teacher_cfg=13.0, teacher_gumbel=2.0),
    'meissonic': dict(
        steps=10_000, batch_size=16, micro_batch=1, grad_checkpoint=True, generator_lr=1e-6,
        aux_lr=1e-6, generator_muon=0.0, aux_muon=0.0, disc_muon=0.0, disc_lr=1e-4, r_max=0.95,
        w_gan=1600.0, beta2=0.999, warmup=100, cooldown=0.0, cfg_scale=4.0, p_full=0.0, p_near=0.0,
        schedule='cosine', label_smoothing=0.1, ema_decay=0.9999, save_every=1000,
        teacher_steps=64, teacher_cfg=9.0, teacher_gumbel=2.0)}

# Settings that the generator's checkpoint hands on
INHERITED = ('teacher', 'teacher_path', 'tokenizer_path', 'teacher_heads', 'text_path', 'prompts',
             'teacher_grid', 'teacher_ckpt', 'r_init', 'sigma_init',
             'tau', 'tau_sample')

LIMITS = dict(         # a number is the least value, a pair a range, words a choice
    teacher=('ours', 'maskgit', 'maskbit', 'maskgen', 'meissonic'), log_every=1, save_every=1, n_eval=4, n_reference=4,
    steps=1, batch_size=1, micro_batch=0, generator_lr=0, aux_lr=0, generator_muon=0, aux_muon=0,
    aux_momentum=(0, 1), beta1=(0, 0.999999), beta2=(0, 0.999999), warmup=0, cooldown=(0, 1),
    clip=0, r_init=(0, 1), sigma_init=(0, 1), tau=1e-6, tau_sample=1e-6, p_full=(0, 1),
    p_near=(0, 1), schedule=('arccos', 'cosine'), label_smoothing=(0, 1), ema_decay=(0, 1),
    teacher_steps=1, relax=('soft', 'gumbel', 'st'), tau_soft=1e-6, r_max=(0, 1), disc_lr=0,
    disc_muon=0, disc_warmup=0, disc_width=1, weight_decay=0, w_gan=0, w_dimo=0, gan_ratio=0)

# What counts only with a choice of `in_use` below; what is named nowhere always counts
PUBLISHED = 'teacher_path tokenizer_path teacher_heads'
USES = {
    '--teacher=ours': 'teacher_ckpt',
    '--teacher=maskgit': PUBLISHED,
    '--teacher=maskbit': PUBLISHED,
    '--teacher=maskgen': f'{PUBLISHED} text_path prompts',
    '--teacher=meissonic': f'{PUBLISHED} text_path prompts teacher_grid',
    '--w_dimo': 'beta cfg_scale p_full p_near label_smoothing aux_lr aux_muon',
    '--w_dimo --aux_muon': 'aux_momentum',
    '--w_dimo, --p_full and --p_near below 1': 'schedule',
    '--w_gan and --w_dimo': 'gan_ratio',
    '--gan_ratio=0': 'w_gan',
    '--w_gan': 'through_pixels hinge r_max relax spectral disc_lr disc_muon disc_warmup disc_width'}
# -----------------------------------------------------------------------------
# The discriminator

def head_layers(depth):
    """Blocks that carry a head, counted from 1: three below depth 12, else four, evenly spaced up
    to the last."""
    n = 3 if depth < 12 else 4
    return sorted({max(1, depth * k // n) for k in range(1, n + 1)})


class Head(nn.Module):
    """One light head: hidden states (B, L, D), conditions (B, C) -> a logit per token (B, L).
    Neighbouring tokens are mixed by a depthwise convolution, 3x3 where they stand on a grid (rows,
    columns), else of width 9 along the line; the condition enters as a projection (Miyato & Koyama
    2018), from zero."""

    def __init__(self, D, width, grid, C, spectral):
        super().__init__()
        self.grid = grid
        self.enter = bounded(nn.Linear(D, width), spectral)
        self.join = bounded(nn.Linear(width, width), spectral)
        if grid:
            self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        else:
            self.mix = nn.Conv1d(width, width, 9, padding=4, groups=width)
        self.leave = bounded(nn.Linear(width, 64), spectral)
        self.score = nn.Linear(64, 1)
        self.condition = nn.Linear(C, 64)              # outside spectral norm: 0 / 0
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def neighbours(self, h):
        h = h.transpose(1, 2)                          # (B, width, L)
        if self.grid:
            h = h.unflatten(2, self.grid)              # (B, width, rows, columns)
        return self.mix(h).flatten(2).transpose(1, 2)

    def forward(self, h, c):
        h = F.layer_norm(h.float(), h.shape[-1:])
        h = F.leaky_relu(self.enter(h), 0.2)           # (B, L, width)
        mixed = self.join(self.neighbours(h))
        h = F.leaky_relu((h + mixed) / 2 ** 0.5, 0.2)
        o = self.leave(h)                              # (B, L, 64)
        projection = (o * self.condition(c)[:, None]).sum(-1) / 8      # over sqrt(64)
        return self.score(o)[..., 0] + projection


def bounded(layer, spectral):
    """A linear layer, perhaps with its spectral norm held at 1."""
    return nn.utils.parametrizations.spectral_norm(layer) if spectral else layer


class Discriminator(nn.Module):
    """Heads on the frozen teacher's hidden states: D(emb_r, r) of Soft-Di[M]O (arXiv 2509.22925).
    `states` is a list of (B, L, D), pooled (B, C) the condition as one vector, r (B, 1) the masked
    share -> one logit per image (B,)."""

    def __init__(self, D, grid, layers, C, width, spectral):
        super().__init__()
        self.heads = nn.ModuleList([Head(D, min(D, width), grid, C + 32, spectral) for _ in layers])

    def forward(self, states, pooled, r):
        angle = r * torch.exp(torch.linspace(0, math.log(1000), 16, device=r.device))    # (B, 16)
        c = torch.cat([pooled.float(), angle.sin(), angle.cos()], 1)                     # (B, C + 32)
        logits = [head(h, c).mean(1) for head, h in zip(self.heads, states)]
        return torch.stack(logits).mean(0)


def make_discriminator(loaded):
    """Heads for a teacher, of random weights."""
    net = loaded.net
    pooled = net.pooled(loaded.encode(loaded.first(1)))        # (1, C)
    return Discriminator(net.D, net.grid, head_layers(len(net.blocks)), pooled.shape[1], disc_width, spectral)


def disc_loss(real_logits, fake_logits, hinge):
    """The discriminator's loss from logits (B,) each: softplus(-D(real)) + softplus(D(fake)), or
    hinge."""
    if hinge:
        return (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).mean()
    return (F.softplus(-real_logits) + F.softplus(fake_logits)).mean()


def gan_loss(fake_logits, hinge):
    """The generator's loss: -log D(fake), non-saturating (Soft-Di[M]O, arXiv 2509.22925), or
    -D(fake) with hinge."""
    return -fake_logits.mean() if hinge else F.softplus(-fake_logits).mean()


# -----------------------------------------------------------------------------
# This stage's equations. nets: teacher (phi), generator (theta), generator_ema, aux (psi), disc

SMOOTHED = ('aux_loss', 'grad_dimo', 'd_loss', 'd_real', 'd_fake', 'acc_real', 'acc_fake', 'g_loss',
            'grad_gan')                                # logged as running means
SHOWN = ('divergence', 'acc_real', 'acc_fake', 'entropy')       # beside the progress bar
BLUR_NATS = 1.0                                        # with --through_pixels: mean entropy of a real token as its picture reads back


def draw_batch(nets, loaded, run, rng):
    """Real tokens (B, N), the condition of their captions, and what the generator makes of it:
    logits, tokens."""
    real, captions = loaded.real.draw(run, rng)
    cond = loaded.encode_batch(captions)
    with run.autocast:
        logits, tokens = one_step(nets.generator, cond, r_init, sigma_init, tau, rng)
    return real, cond, logits, tokens


def dimo_gradient(nets, x_t, mask, cond):
    """dD/dz at the re-masked sample x_t (B, N), with mask (B, N) -> gradient (B, N, V), and the
    auxiliary logits, whose graph aux_loss still needs (Di[M]O, arXiv 2503.15457, generator
    update)."""
    with torch.no_grad():
        teacher_logits = guided_logits(nets.teacher, x_t, cond, cfg_scale)
    aux_logits = nets.aux(x_t, cond)
    return dimo_grad(teacher_logits, aux_logits.detach(), mask, beta), aux_logits


@torch.no_grad()
def divergence(nets, x_t, mask, cond):
    """D(teacher || aux) at x_t per masked token, which that gradient descends: for the log."""
    teacher_logits = guided_logits(nets.teacher, x_t, cond, cfg_scale)
    aux_logits = nets.aux(x_t, cond)
    return jeffreys(teacher_logits, aux_logits, mask, beta).sum() / mask.sum()


def seen_through_pixels(tokenizer, temperature, x):
    """Ids (B, N) or probabilities (B, N, V) -> probabilities (B, N, V): as their picture reads back.
    It is decoded, not clamped so that the gradient passes, and encoded again; each latent chooses
    softly among the codes near it. Ours, not the paper's."""
    z = tokenizer.latents(tokenizer.decode(x))         # (B, N, code_dim)
    return (-distance_to_rows(z, tokenizer.table) / temperature).softmax(-1)       # which |z|^2 does not change


@torch.no_grad()
def blur_temperature(tokenizer, real):
    """The temperature at which real tokens (M, N), decoded and encoded again, have a mean entropy of
    BLUR_NATS. Raises ValueError where there is none."""
    distance = []
    for part in real.split(tokenizer.batch):
        z = tokenizer.latents(tokenizer.decode(part))
        distance.append(distance_to_rows(z, tokenizer.table))
    distance = torch.cat(distance)                     # (M, N, V)

    def excess(log_temperature):
        entropy, _ = token_entropy(-distance / math.exp(log_temperature))
        return float(entropy) - BLUR_NATS
    if excess(-20) > 0 or excess(20) < 0:
        raise ValueError(f'--through_pixels needs {BLUR_NATS} nats a token; the codes of this tokenizer leave '
                         f'{excess(-20) + BLUR_NATS:.2f} to {excess(20) + BLUR_NATS:.2f}, as too many are alike or '
                         'there are too few')
    return math.exp(brentq(excess, -20, 20, xtol=1e-3))


def look(net, real, logits, cond, rng, through=None):
    """Real tokens (B, N) as hard, fake logits (B, N, V) as soft embeddings, masked alike at a share
    r ~ U[0, r_max], through the frozen teacher -> its hidden states of real and of fake, lists of
    (B, L, D); r (B, 1). `through` is what both are seen through, a function of ids or probabilities."""
    r = r_max * random_numbers((len(real), 1), rng, real.device)
    mask = random_positions(real.shape, (r * net.N).round(), rng, real.device)
    fake = relaxed(logits, relax, tau_soft, rng)
    if through:
        fake = through(fake)
        with torch.no_grad():
            real = through(real)
    fake_emb = net.embed(fake, mask)                   # Soft-Di[M]O Eq. 3
    real_emb = net.embed(real, mask)
    layers = head_layers(len(net.blocks))
    with torch.no_grad():                              # no gradient is asked of the real half
        real_states = net.features(real_emb, cond, layers)
    fake_states = net.features(fake_emb, cond, layers)
    return real_states, fake_states, r


def judge(disc, real_states, fake_states, pooled, r):
    """Train the heads on the states of `look`, of which no gradient is taken -> numbers for the
    log."""
    seen = [torch.cat([real, fake.detach()]) for real, fake in zip(real_states, fake_states)]
    verdict = disc.train()(seen, torch.cat([pooled, pooled]), torch.cat([r, r]))
    d_real, d_fake = verdict.chunk(2)
    loss = disc_loss(d_real, d_fake, hinge)
    loss.backward()
    d_real, d_fake = d_real.detach(), d_fake.detach()
    return dict(d_loss=loss.detach(), d_real=d_real.mean(), d_fake=d_fake.mean(),
                acc_real=(d_real > 0).float().mean(), acc_fake=(d_fake < 0).float().mean(),
                g_loss=gan_loss(d_fake, hinge))


def gan_gradient(disc, fake_states, pooled, r, logits):
    """d(-log D(emb_r, r)) / dz, per image: (B, N, V). Another loss of the generator goes into
    `gan_loss`."""
    disc.eval()                                        # no power iteration of the spectral norm
    loss = gan_loss(disc(fake_states, pooled, r), hinge)
    return torch.autograd.grad(loss, logits)[0].float() * len(logits)


def look_and_judge(nets, real, logits, cond, run, rng):
    through = getattr(nets, 'through', None)           # with --through_pixels
    with run.autocast:
        real_states, fake_states, r = look(nets.teacher, real, logits, cond, rng, through)
        pooled = nets.teacher.pooled(cond)             # (B, C)
    return fake_states, pooled, r, judge(nets.disc, real_states, fake_states, pooled, r)


def update(nets, optimizers, loaded, run, step):
    """One step of generator, auxiliary model and discriminator -> numbers for the log, logits (B,
    N, V)."""
    # Set the learning rates
    set_rates(optimizers['generator'] + optimizers['aux'], rate_law(step, steps, warmup, cooldown))
    # Accumulate gradients
    nets.generator.zero_grad()
    nets.aux.zero_grad()
    nets.disc.zero_grad()
    numbers = {}
    for k in range(run.accumulate):
        rng = micro_rng(seed, step, k, run)
        real, cond, logits, tokens = draw_batch(nets, loaded, run, rng)
        total = torch.zeros_like(logits, dtype=torch.float32)      # gradient of the whole loss at the logits, times B
        # Di[M]O: the regulariser, and the auxiliary model's own loss
        if w_dimo:
            x_t, mask = remask(tokens, nets.generator.mask_id, schedule, rng, p_full, p_near)
            with run.autocast:
                grad, aux_logits = dimo_gradient(nets, x_t, mask, cond)
            psi_loss = aux_loss(aux_logits, tokens, mask, label_smoothing)
            psi_loss.backward()
            grad_dimo = w_dimo * grad
            total += grad_dimo
            numbers.update(aux_loss=psi_loss.detach(), grad_dimo=grad_dimo.norm() / run.micro)
        # GAN: the same states serve both players
        if w_gan:
            fake_states, pooled, r, health = look_and_judge(nets, real, logits, cond, run, rng)
            grad_gan = w_gan * gan_gradient(nets.disc, fake_states, pooled, r, logits)
            if w_dimo and gan_ratio:
                grad_gan *= gan_ratio * grad_dimo.norm() / grad_gan.norm().clamp(min=1e-12)
            total += grad_gan
            numbers.update(health, grad_gan=grad_gan.norm() / run.micro)
        surrogate(logits, total).backward()
    # Look at the divergence
    if w_dimo and (step + 1) % log_every == 0:
        with run.autocast:
            numbers['divergence'] = divergence(nets, x_t, mask, cond)
    # Update weights
    numbers.update(norm_disc=torch.zeros(()), norm_aux=torch.zeros(()))        # one that breaks the others comes first
    if w_gan:
        numbers['norm_disc'] = take_step(nets.disc, optimizers['disc'], run, clip)
    if w_dimo:
        numbers['norm_aux'] = take_step(nets.aux, optimizers['aux'], run, clip)
    numbers['norm_generator'] = take_step(nets.generator, optimizers['generator'], run, clip)
    # Update the average
    ema_update(nets.generator_ema, nets.generator, ema_decay, step)
    return numbers, logits.detach()


def warm_up_heads(nets, optimizers, loaded, run, stop):
    """The discriminator alone learns the game first."""
    bar = progress(disc_warmup, 'discriminator')
    for step in range(disc_warmup):
        if stop.now(step, run.device):
            break
        nets.disc.zero_grad()
        for k in range(run.accumulate):
            rng = micro_rng(seed, -1 - step, k, run)
            with torch.no_grad():
                real, cond, logits, _ = draw_batch(nets, loaded, run, rng)
            look_and_judge(nets, real, logits, cond, run, rng)
        norm = take_step(nets.disc, optimizers['disc'], run, clip)
        check_finite(step, dict(norm_disc=norm))
        bar.update()
    bar.close()


# -----------------------------------------------------------------------------
# Its instruments

@torch.no_grad()
def relaxation_gap(nets, loaded, captions):
    """Toy FD between decoded softmax(z / tau_soft), whatever `relax` is, and hard samples of the
    same z."""
    rngs = image_rngs(seed, range(len(captions)), loaded.device)
    logits, tokens = one_step(nets.generator_ema, loaded.encode(captions), r_init, sigma_init, tau, rngs)
    soft = decode_images(loaded.tokenizer, relaxed(logits, 'soft', tau_soft), captions)
    hard = decode_images(loaded.tokenizer, tokens, captions)
    return frechet_distance(toy_features(soft), toy_features(hard))


def advice(row, first):
    """What the health numbers of a log line, beside those of the first line, ask for: a set of
    sentences."""
    asked = set()
    if row.get('acc_real', 0) + row.get('acc_fake', 0) > 1.8:
        asked.add('the discriminator is right in more than 90 % of the cases, so its gradient fades; lower --disc_lr, '
                  'raise --r_max, lower --w_gan or --gan_ratio if it oscillates, or try --relax=st or '
                  '--through_pixels while the entropy is high')
    if row['entropy'] < 0.5 * first['entropy'] and row['gap'] < 0.5 * first['gap']:
        asked.add('the entropy has halved: compare the distances above; if they do not fall, the generator only sharpens '
                  'its logits: lower --w_gan, raise --r_max or try --relax=st')
    return asked


def print_bias(loaded, start, out):
    """The bias of soft embeddings beside its bound, through the decoder and through the teacher's
    first block, for the teacher as a generator, the checkpoint `start`, and gan.pt where it is."""
    net, tokenizer, captions = loaded.net, loaded.tokenizer, loaded.examples(32)
    cond = loaded.encode_batch(captions)

    def decoder(e):
        return tokenizer.decode_latents(e, captions)

    def first_block(e):
        emb = net.input_proj(e.reshape(len(e), net.L, -1))
        return net.features(emb, cond, [1])[0]
    made_by = {'teacher, untrained as generator': net.state_dict(), f'{start["stage"]}.pt': start['ema']}
    if os.path.exists(out):
        made_by['gan.pt'] = load_checkpoint(out, 'gan', fallback=True)['ema']
    print(f'soft embeddings of 32 captions, mean over images and 32 draws each\n{"generator":34s}{"f":18s}entropy  '
          'tr Cov(e)  |f(E e) - E f(e)|   bound  relative to |f(E e)|')
    for name, weights in made_by.items():
        rngs = image_rngs(seed, range(len(captions)), loaded.device)
        logits, _ = one_step(copy_of(net, weights, name), cond, r_init, sigma_init, tau, rngs)
        z = logits.float() / tau_soft
        label = f'{name:34s}'
        print_bias_of(decoder, z, tokenizer.table, f'{label}{"decoder":18s}')
        print_bias_of(first_block, z, net.table[:net.V], f'{label}{"first block":18s}')


def print_bias_of(f, z, table, label):
    probs, (entropy, _) = z.softmax(-1), token_entropy(z)
    gap, bound, trace = relaxation_bias(f, probs, table, rng_for(seed, 0, 'bias', z.device))
    size = f(probs @ table).flatten(1).norm(dim=1).mean()
    print(f'{label}{entropy:7.3f}{trace.mean():11.3f}{gap.mean():19.3f}{bound.mean():8.3f}{gap.mean() / size:23.4f}')


def real_tokens(folder, loaded, run):
    """The images of the data as tokens, encoded once; mirrored too if asked, or if our teacher saw
    them so."""
    size, n_images = loaded.tokenizer.config['image_size'], loaded.config.get('n_images', 50_000)
    loaded.source = open_data(loaded.data, size, n_images, expected=loaded.words)      # no others than our teacher saw
    mirrored = flips or loaded.config.get('flips', False)
    table = token_data(loaded.source, loaded.tokenizer, folder, run.device, flips=mirrored)    # (M, N + T)
    return TokenData(table, loaded.net.N, loaded.source)


class RandomTokens:
    """A stand-in for real images, to time a published size without any file."""

    def __init__(self, loaded):
        self.loaded = loaded

    def __len__(self):
        return len(self.loaded.prompts)

    def draw(self, run, rng):
        shape = run.micro, self.loaded.net.N
        tokens = torch.randint(self.loaded.net.V, shape, generator=rng, device=run.device)
        return tokens, self.loaded.first(run.micro)


def in_use(s):
    """Which words of USES count with the settings `s`."""
    words = [f'--teacher={s.teacher}']
    if s.w_dimo:
        words.append('--w_dimo')
    if s.w_dimo and s.aux_muon:
        words.append('--w_dimo --aux_muon')
    if s.w_dimo and s.p_full + s.p_near < 1 - 1e-6:
        words.append('--w_dimo, --p_full and --p_near below 1')
    if s.w_gan:
        words.append('--w_gan')
    if s.w_gan and s.w_dimo:
        words.append('--w_gan and --w_dimo')
    if not (s.w_gan and s.w_dimo and s.gan_ratio):
        words.append('--gan_ratio=0')
    return words


def handed_on(settings):
    """The generator that the run starts from, and what its checkpoint says: teacher, paths, the
    generator's settings."""
    folder = out_folder(settings['out_dir'], settings['teacher'])
    start = settings['init'] or os.path.join(folder, 'distill.pt')
    if settings['bench'] and settings['teacher_path'] == 'random':
        return dict(init=start)
    return dict(settings_of(start, INHERITED), init=start)


def load_start(folder, run):
    """-> the teacher with what surrounds it, the real images too; the checkpoint that generator and
    auxiliary model start from."""
    path = teacher_file(teacher, teacher_path, teacher_ckpt, folder, init)
    if bench and teacher_path == 'random':
        loaded = load_teacher(teacher, path, tokenizer_path, '', teacher_heads, run.device, text_path or 'random')
        loaded.real, weights = RandomTokens(loaded), loaded.net.state_dict()
        return loaded, dict(stage='model', ema=weights, aux=weights)
    start = load_checkpoint(init, 'distill|gan|reward', 'Make it with: python distill.py', fallback=True)
    loaded = load_teacher(teacher, path, tokenizer_path, data or start['data'], teacher_heads, run.device, text_path,
                          prompts, teacher_grid)
    same_origin(loaded, start, init)
    note_unfinished(start, init)
    loaded.origin['start'] = hash_of_weights(start['ema'])
    if not loaded.data:
        raise ValueError('the discriminator needs real images; give --data=FOLDER of class folders or of '
                         'captioned images')
    if not bias:
        loaded.real = real_tokens(folder, loaded, run)
    return loaded, start


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals(), RECIPES, handed_on)
    run = start_run(batch_size, micro_batch)
    stage, folder = 'gan', out_folder(out_dir, teacher)
    out = os.path.join(folder, f'{stage}.pt')
    if os.path.abspath(init) == os.path.abspath(out):
        raise ValueError(f'--init={init} would be overwritten; choose another --out_dir')
    if not (bench or bias):
        claim(out, resume or overwrite)
    if not w_gan and not w_dimo:
        raise ValueError('--w_gan=0 and --w_dimo=0 leave nothing to learn')
    if through_pixels and teacher == 'maskgen':
        raise ValueError('--through_pixels cannot be had of MaskGen, whose decoder reads the caption')
    if bias and run.world > 1:
        raise ValueError('--bias runs as one process; start it with python, not torchrun')
    loaded, start = load_start(folder, run)
    if bias:
        print_bias(loaded, start, out)
        raise SystemExit

    # Build the networks
    nets = SimpleNamespace(teacher=loaded.net)
    nets.generator = copy_of(loaded.net, start['ema'], stage, True, freeze_tables, grad_checkpoint)
    nets.generator_ema = copy_of(loaded.net, start['ema'], stage)
    nets.aux = copy_of(loaded.net, start['aux'], stage, True, freeze_tables, grad_checkpoint)
    nets.teacher.checkpointing = grad_checkpoint       # the heads' gradient passes through it
    torch.manual_seed(seed)
    nets.disc = make_discriminator(loaded).to(run.device)
    if through_pixels and w_gan:
        some, _ = loaded.real.draw(SimpleNamespace(micro=32, device=run.device), rng_for(seed, 0, 'heat', run.device))
        temperature = blur_temperature(loaded.tokenizer, some)
        nets.through = partial(seen_through_pixels, loaded.tokenizer, temperature)

    # Build the optimizers
    optimizers, betas = {}, (beta1, beta2)
    optimizers['generator'] = make_optimizers(nets.generator, generator_muon, generator_lr, betas,
                                              weight_decay)
    optimizers['aux'] = make_optimizers(nets.aux, aux_muon, aux_lr, betas, momentum=aux_momentum)
    optimizers['disc'] = make_optimizers(nets.disc, disc_muon, disc_lr, (0.9, 0.99))

    # Resume
    step, smooth = 0, {}
    if resumes(resume, out):
        state = load_resumed(out, stage, config)
        same_origin(loaded, state, out)
        restore(nets.generator, state['net'], out, 'net')
        restore(nets.generator_ema, state['ema'], out, 'ema')
        restore(nets.aux, state['aux'], out, 'aux')
        restore(nets.disc, state['disc'], out, 'disc')
        restore_optimizers(optimizers, state['optimizers'], out)
        set_rates(optimizers['disc'], 1)               # the others' follow in every update
        step = state['step']
        smooth = {key: value.to(run.device) for key, value in state['smooth'].items()}
    same_weights(nets.generator, nets.generator_ema, nets.aux, nets.disc)
    if compile:
        compile_blocks(nets.teacher, nets.generator, nets.aux)

    # Print the plan
    if run.rank == 0:
        print(f'generator {millions(nets.generator):.2f} M parameters')
        print(f'{steps} updates of {batch_size} = {run.world} x {run.accumulate} x {run.micro}')
        print(f'heads {millions(nets.disc):.2f} M parameters, {len(loaded.real)} real images')
    if bench:
        def bench_step():
            update(nets, optimizers, loaded, run, step)
        report_bench(bench_step, batch_size, run)
        raise SystemExit
    log = Log(out, step) if run.rank == 0 else None

    # Choose what to show and to measure
    reference = Reference.of(loaded, folder, n_reference)
    shown = reference.prompts(32)[0][:16]
    most = min(teacher_steps, nets.teacher.N)
    one_pass = student_sampler(nets.generator_ema, r_init, sigma_init, tau_sample)
    compared = teacher_sampler(nets.teacher, most, teacher_cfg, teacher_gumbel)
    if run.rank == 0:
        compared_grid, _ = render(compared, loaded, shown, seed)

    # The discriminator alone learns the game first
    stop = Stop()
    if step == 0 and w_gan:
        warm_up_heads(nets, optimizers, loaded, run, stop)

    warned, first_row = set(), None
    bar = progress(steps, stage, step)
    while True:
        ending = step >= steps or stop.now(step, run.device)
        if run.rank == 0 and (step % save_every == 0 or ending):
            # Measure
            if reference:
                captions, _ = reference.prompts(min(500, n_eval))
                row = reference.measure(render(one_pass, loaded, captions, seed)[0], captions)
                bar.write(f'step {step}: {in_short(row)}')
            # Save
            state = dict(loaded.pack(), stage=stage, step=step, config=config, smooth=smooth)
            state.update(net=nets.generator.state_dict(), ema=nets.generator_ema.state_dict())
            state.update(aux=nets.aux.state_dict(), optimizers=optimizer_states(optimizers))
            state.update(disc=nets.disc.state_dict())
            if step:
                save_checkpoint(out, state)
            # Show
            grid, _ = render(one_pass, loaded, shown, seed)
            picture = f'{folder}/{stage}-{step:06d}.png'
            save_grid(picture, torch.cat([compared_grid, grid]), shown * 2)
            bar.write(f'step {step}: grid in {picture}')
        if ending:
            break
        # -------------------------------------------------------------------------
        numbers, logits = update(nets, optimizers, loaded, run, step)
        smoothed(smooth, numbers, SMOOTHED)
        step += 1
        bar.update()
        # Log
        logging = step % log_every == 0
        saving = step % save_every == 0 or step == steps
        if run.rank == 0 and (logging or saving):
            check_finite(step, numbers)
        if run.rank == 0 and logging:                  # norms: of all processes; the rest: the last
                                                       # micro-batch of this one
            entropy, top = token_entropy(logits)
            if w_dimo and w_gan:
                numbers['ratio'] = smooth['grad_gan'] / smooth['grad_dimo']
            numbers['gap'] = relaxation_gap(nets, loaded, loaded.examples(250))
            row = rounded({**numbers, **smooth, 'entropy': entropy, 'max_prob': top})
            bar.set_postfix({key: row[key] for key in SHOWN if key in row}, refresh=False)
            log.write(dict(step=step, **row))
            first_row = first_row or row
            for text in advice(row, first_row) - warned:
                bar.write(f'step {step}: {text}')
                warned.add(text)
    bar.close()
    stop.over()

    # Print the table
    if run.rank == 0 and step >= steps and reference:
        samplers = {}
        passes = teacher_passes(nets.teacher, most, teacher_cfg)
        plural = 's' if most > 1 else ''
        samplers[f'teacher, {most} step{plural}'] = passes, compared
        before = 'gan before' if start['stage'] == 'gan' else start['stage']
        start_net = copy_of(loaded.net, start['ema'], stage)
        samplers[f'{before}, 1 step'] = 1, student_sampler(start_net, r_init, sigma_init, tau_sample)
        samplers['gan, 1 step'] = 1, one_pass
        final_table(out[:-3], samplers, loaded, reference, n_eval, seed, config)
    end_run()
