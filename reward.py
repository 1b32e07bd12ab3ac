"""
Stage 2b, rewards (Soft-Di[M]O, arXiv 2509.22925): follow the prompt better, by gradients through the decoded image.

    loss = - sum_i w_i R_i(decode(softmax(z)), prompt) + w_dimo Di[M]O surrogate

Left out: the GAN term (start from its result instead, --init=out/gan.pt: both terms in one loop would
double this file). Added: a held-out reward that is never optimised and
ends the run when it turns. The settings of the Di[M]O term (r_init, beta, tau, ...) are read from the
checkpoint that the run starts from.

$ python reward.py                              # from out/distill.pt; trains its two small reward models if missing
$ python reward.py --w_dimo=0 --patience=0 --init=out/distill.pt --out_dir=out/hack   # without the Di[M]O term
$ python reward.py --relax=st --init=out/gan.pt # straight-through instead of soft, from another generator
$ python reward.py --w_clip=0 --w_hps=5 --hps_path=HPS_v2.1_compressed.pt   # a published reward (needs transformers)
$ torchrun --nproc_per_node=8 reward.py --batch_size=1024 --generator_lr=1e-5 --aux_lr=1e-5
Expected (2 CPU cores, shapes world): the table that assets/RESULTS.md shows, printed at its end.
"""
import os
from types import SimpleNamespace

import torch

from common.files import (Log, claim, load_checkpoint, load_resumed, note_unfinished, optimizer_states,
                          restore, restore_optimizers, resumes, save_checkpoint, settings_of)
from common.metrics import final_table, in_short, render
from common.pictures import save_grid
from common.rewards import (Judged, load_held_out, load_rewards, make_rewards, needs_small_rewards, published_in_use,
                            reward_sum)
from common.run import (Stop, agreed, check_finite, compile_blocks, configure, ema_update, end_run,
                        make_optimizers, micro_rng, millions, out_folder, progress, rate_law,
                        report_bench, rounded, same_weights, set_rates, smoothed, start_run,
                        take_step)
from common.teachers import copy_of, load_teacher, same_origin, teacher_file
from model import (aux_loss, dimo_grad, draw_tokens, guided_logits, jeffreys, teacher_sampler, relaxed,
                   remask, start_embedding, student_sampler, surrogate, teacher_passes, token_entropy)
from tokenizer import hash_of_weights

# -----------------------------------------------------------------------------
# I/O
init = ''              # generator to start from, '' = out_dir/distill.pt; gan.pt and reward.pt do as well
data = ''              # images, '' = what the teacher was trained on; say where that folder is if it has moved
out_dir = ''           # rewards.pt is found here; reward.pt, log, pictures go here, '' = out/ or out/NAME of the teacher
teacher = 'ours'       # this and the next four: read from the generator's checkpoint unless given
teacher_path = ''      # file of a published teacher
tokenizer_path = ''    # file of its tokenizer
teacher_heads = 0      # attention heads of a published teacher, which its file does not tell; 0 = as published
text_path = ''         # CLIP text encoder of maskgen, meissonic: folder (weights, word files) or hub id
prompts = ''           # file of prompts that these train on (.txt, .jsonl, .json, .csv), '' = captions of --data
teacher_grid = 0       # tokens a side of a Meissonic, which its file does not tell; 0 = as published
teacher_ckpt = ''      # another teacher of ours than the model.pt beside the generator
resume = False         # continue from out_dir/reward.pt to the same bits
overwrite = False      # a reward.pt that is there may be replaced by a new run
seed = 0               # every random number of the run follows from it
log_every = 25         # steps between log lines
save_every = 100       # steps between checkpoints, sample grids and measurements of 500 images
n_eval = 2000          # images behind each row of the final table, a quarter where the sampler is slow
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
# rewards: one weight each, 0 = off and not loaded
w_clip = 10.0          # two-tower model of the small world, trained here: log P(caption is true of the image) <= 0
w_clipscore = 0.0      # CLIP ViT-H/14, 100 cos; ReNO .01
w_hps = 0.0            # HPSv2.1, cos; ReNO 5
w_pick = 0.0           # PickScore, exp(logit_scale) cos; ReNO .05
w_imagereward = 0.0    # ImageReward, about N(0, 1); ReNO 1
clip_path = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'  # hub id or local folder; also the tokenizer of the three ViT-H
hps_path = 'HPS_v2.1_compressed.pt'       # file of open_clip names
pick_path = 'yuvalkirstain/PickScore_v1'  # hub id or local folder
imagereward_path = 'ImageReward.pt'       # file
bert_path = 'bert-base-uncased'           # word pieces of ImageReward: hub id or local folder
relax = 'soft'         # images from softmax(z / tau) (soft), Gumbel (gumbel) or plain (st) straight-through samples
held_out = ''          # rewards of weight 0 that are only reported and stop the run, as in pick,clipscore; '' = the small one
w_dimo = 1.0           # weight of the Di[M]O surrogate, the guard against reward hacking; 0 = off
ramp = 0.1             # share of the steps over which the reward weights rise from 0
patience = 3           # stop after so many measurements without a better held-out reward, keeping the best; 0 = never
# the small reward models
reward_steps = 500     # updates of each
reward_batch = 128     # images per update, half of them decoded from mixed tokens
reward_lr = 2e-3       # AdamW, 50 steps of warm-up, falls to zero along a cosine
n_wrong = 6            # wrong captions per image: one fact changed
# Di[M]O
steps = 400            # generator updates
batch_size = 32        # images per update, all processes together; paper 64
micro_batch = 0        # images per forward pass on one device, 0 = all; lower it to save memory
generator_lr = 1e-4    # Adam; paper 1e-5 on everything
aux_lr = 5e-4          # Adam; the auxiliary model must follow the generator; paper 1e-5 on everything
generator_muon = 0.002  # Muon on the matrices of the trunk; 0 = Adam on everything, as in the paper
aux_muon = 0.01        # the same for the auxiliary model
aux_momentum = 0.8     # its Muon's, as in distill.py
beta1 = 0.9            # Adam
beta2 = 0.99           # Adam; paper .999
weight_decay = 0.0     # of the generator; paper 0
warmup = 25            # steps of linear warm-up; paper 100
cooldown = 0.8         # last share of the steps over which the rates fall to 5 %; paper 0
clip = 1.0             # largest gradient norm, each network, 0 = none; paper 1
image_clip = 3.0       # largest gradient norm of one image at the generator's input, 0 = none; paper 0
r_init = 0.6           # this and all to freeze_tables: as the generator was made, read from its checkpoint
sigma_init = 0.1       # std of the noise on its token embeddings
tau = 1.0              # temperature of the one-step sample in training
tau_sample = 1.0       # the same in pictures and tables
beta = 0.0             # generalized Jeffreys: 0 forward KL, 1 reverse KL
cfg_scale = 1.0        # teacher guidance u + s (c - u) in the surrogate, 1 = none
p_full = 0.0           # share of re-maskings that hide everything; paper 0
p_near = 0.0           # share that shows 1 to N / 8 tokens; paper 0
schedule = 'arccos'    # law of the ratio of the others: arccos (MaskGIT) or cosine (Meissonic)
label_smoothing = 0.0  # in the auxiliary loss; released code .1
freeze_tables = True   # keep the embedding tables of generator and auxiliary at the teacher's
ema_decay = 0.98       # averaged generator, which is what gets sampled; paper .9999
# the teacher in the final table
teacher_steps = 16     # steps of the confidence sampler
teacher_cfg = 1.5      # guidance at the last step, rising from 1
teacher_gumbel = 8.0   # Gumbel temperature of the confidence, falling to 0
# system
compile = False        # torch.compile the blocks of the three networks
half_decoder = True    # decode for the rewards in bf16 where the device computes in it; tables decode in float32
grad_checkpoint = False  # recompute the blocks of networks, decoder and rewards in backward: less memory, more time
bench = False          # time 20 steps and stop

# What --teacher=NAME changes. Text to image: the paper names neither prompts nor reward weights; ours are ReNO's times
# ten, as the Di[M]O term is a sum, and PickScore is held out. For classes: only the rates of the other stages
RECIPES = {
    'maskgit': dict(steps=10_000, batch_size=64, generator_lr=1e-5, aux_lr=1e-5, generator_muon=0.0, aux_muon=0.0,
                    beta2=0.999, warmup=100, cooldown=0.0, image_clip=0.0, ema_decay=0.9999, save_every=500,
                    teacher_steps=8, teacher_cfg=4.0, teacher_gumbel=4.5),
    'maskbit': dict(steps=10_000, batch_size=64, generator_lr=1e-5, aux_lr=1e-5, generator_muon=0.0, aux_muon=0.0,
                    beta2=0.999, warmup=100, cooldown=0.0, image_clip=0.0, ema_decay=0.9999, save_every=500,
                    teacher_steps=64, teacher_cfg=8.1, teacher_gumbel=7.8),
    'maskgen': dict(w_clip=0.0, w_clipscore=0.1, w_hps=50.0, w_imagereward=10.0, held_out='pick', steps=50_000,
                    batch_size=64, generator_lr=1e-6, aux_lr=1e-6, generator_muon=0.0, aux_muon=0.0, beta2=0.999,
                    warmup=100, cooldown=0.0, image_clip=0.0, ema_decay=0.9999, save_every=1000, teacher_steps=16,
                    teacher_cfg=13.0, teacher_gumbel=2.0, n_eval=100),
    'meissonic': dict(w_clip=0.0, w_clipscore=0.1, w_hps=50.0, w_imagereward=10.0, held_out='pick', steps=20_000,
                      batch_size=16, micro_batch=1, grad_checkpoint=True, generator_lr=1e-6, aux_lr=1e-6,
                      generator_muon=0.0, aux_muon=0.0, beta2=0.999, warmup=100, cooldown=0.0, image_clip=0.0,
                      ema_decay=0.9999, save_every=1000, teacher_steps=64, teacher_cfg=9.0, teacher_gumbel=2.0,
                      n_eval=100)}

# Settings that the generator's checkpoint hands on
INHERITED = ('teacher', 'teacher_path', 'tokenizer_path', 'teacher_heads', 'text_path', 'prompts',
             'teacher_grid', 'teacher_ckpt', 'r_init', 'sigma_init',
             'tau', 'tau_sample', 'beta', 'cfg_scale', 'p_full', 'p_near', 'schedule', 'label_smoothing',
             'freeze_tables')

LIMITS = dict(         # a number is the least value, a pair a range, words a choice
    teacher=('ours', 'maskgit', 'maskbit', 'maskgen', 'meissonic'), log_every=1, save_every=1, n_eval=4, n_reference=4,
    steps=1, batch_size=1, micro_batch=0, generator_lr=0, aux_lr=0, generator_muon=0, aux_muon=0,
    aux_momentum=(0, 1), beta1=(0, 0.999999), beta2=(0, 0.999999), weight_decay=0, warmup=0,
    cooldown=(0, 1), clip=0, r_init=(0, 1), sigma_init=(0, 1), tau=1e-6, tau_sample=1e-6,
    p_full=(0, 1), p_near=(0, 1), schedule=('arccos', 'cosine'), label_smoothing=(0, 1),
    ema_decay=(0, 1), teacher_steps=1, relax=('soft', 'gumbel', 'st'), ramp=(0, 1), patience=0,
    image_clip=0, w_dimo=0, reward_steps=0, reward_batch=2, reward_lr=0, n_wrong=1)

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
    '--w_clip or --held_out=': 'reward_steps reward_batch reward_lr n_wrong',
    '--w_clipscore or --held_out=clipscore': 'clip_path',
    '--w_hps or --held_out=hps': 'clip_path hps_path',
    '--w_pick or --held_out=pick': 'clip_path pick_path',
    '--w_imagereward or --held_out=imagereward': 'imagereward_path bert_path'}
# -----------------------------------------------------------------------------
# This stage's equations. nets: teacher (phi), generator (theta), generator_ema, aux (psi)

SMOOTHED = ('aux_loss', 'grad_dimo', 'grad_reward')    # logged as running means
SHOWN = ('reward', 'held_out', 'entropy')              # beside the progress bar


def draw_batch(nets, loaded, run, rng):
    """Training captions, and what the generator makes of them -> captions, cond, its input emb (B,
    L, D), which gets a gradient, logits (B, N, V), tokens (B, N): `one_step` with emb at hand."""
    index = torch.randint(len(loaded.prompts), (run.micro,), generator=rng, device=run.device)
    captions = [loaded.prompts[k] for k in index.tolist()]
    cond = loaded.encode_batch(captions)
    emb = start_embedding(nets.generator, run.micro, r_init, sigma_init, rng)
    if not emb.requires_grad:                          # frozen tables
        emb.requires_grad_()
    with run.autocast:
        logits = nets.generator(emb, cond)
    return captions, cond, emb, logits, draw_tokens(logits, tau, rng)


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


def reward_gradient(logits, captions, tokenizer, rewards, rng, weight=1.0):
    """d(- sum_i w_i R_i(decode(softmax(z / tau)), prompt)) / dz, per image (Soft-Di[M]O, arXiv
    2509.22925, rewards) -> gradient (B, N, V) in float32, down to z only; the images (B, 3, H,
    W)."""
    z = logits.detach().float().requires_grad_()
    images = tokenizer.decode(relaxed(z, relax, tau, rng), captions)
    loss = -reward_sum(rewards, images, captions).sum() * weight
    loss.backward()
    return z.grad, images.detach()


def limit_images(emb, logits, grad):
    """An image between two modes has a gradient hundreds of times larger than the median; no image
    may dominate -> grad (B, N, V) with at most image_clip per image at the generator's input emb,
    share of the limited images."""
    loss = surrogate(logits, grad) * len(logits)
    loss.backward(inputs=[emb], retain_graph=True)
    size = emb.grad.flatten(1).norm(dim=1)             # (B,)
    factor = image_clip / size.clamp(min=image_clip)
    return grad * factor[:, None, None], (size > image_clip).float().mean()


def update(nets, optimizers, loaded, run, step):
    """One step: reward and Di[M]O gradients at the logits, auxiliary update -> numbers for the log,
    logits (B, N, V), images, captions."""
    # Set the learning rates
    set_rates(optimizers['generator'] + optimizers['aux'], rate_law(step, steps, warmup, cooldown))
    # Accumulate gradients
    nets.generator.zero_grad()
    nets.aux.zero_grad()
    numbers = {}
    for k in range(run.accumulate):
        rng = micro_rng(seed, step, k, run)
        captions, cond, emb, logits, tokens = draw_batch(nets, loaded, run, rng)
        # Rewards, whose weights rise over the ramp
        weight = min(1, (step + 1) / max(1, ramp * steps))
        reward_grad, images = reward_gradient(logits, captions, loaded.decoder, loaded.rewards, rng,
                                              weight)
        grad = torch.zeros_like(reward_grad)
        # Di[M]O: the regulariser, and the auxiliary model's own loss
        if w_dimo:
            x_t, mask = remask(tokens, nets.generator.mask_id, schedule, rng, p_full, p_near)
            with run.autocast:
                grad, aux_logits = dimo_gradient(nets, x_t, mask, cond)
            psi_loss = aux_loss(aux_logits, tokens, mask, label_smoothing)
            psi_loss.backward()
            grad = w_dimo * grad
            numbers['aux_loss'] = psi_loss.detach()
        total = grad + reward_grad
        if image_clip:
            total, numbers['clipped_images'] = limit_images(emb, logits, total)
        surrogate(logits, total).backward()
    # Look at the divergence
    if w_dimo and (step + 1) % log_every == 0:
        with run.autocast:
            numbers['divergence'] = divergence(nets, x_t, mask, cond)
    # Update weights
    numbers.update(norm_generator=take_step(nets.generator, optimizers['generator'], run, clip),
                   norm_aux=torch.zeros(()))
    if w_dimo:
        numbers['norm_aux'] = take_step(nets.aux, optimizers['aux'], run, clip)
    # Update the average
    ema_update(nets.generator_ema, nets.generator, ema_decay, step)
    numbers.update(grad_dimo=grad.norm() / run.micro, grad_reward=reward_grad.norm() / run.micro)    # before image_clip
    return numbers, logits.detach(), images, captions


def has_turned(held, patience):
    """Early stopping: `patience` measurements of the held-out reward since its best; 0 = never."""
    if not held or not patience:
        return False
    since_best = len(held) - 1 - held.index(max(held))
    return since_best >= patience


MEASURED = ('reward', 'held_out', 'accuracy', 'toy_fd')


def is_measured(history, step):
    return any(row['step'] == step for row in history)


def held_out_of(row):
    return row['held_out']


def in_use(s):
    """Which words of USES count with the settings `s`."""
    words = [f'--teacher={s.teacher}']
    if s.w_dimo:
        words.append('--w_dimo')
    if s.w_dimo and s.aux_muon:
        words.append('--w_dimo --aux_muon')
    if s.w_dimo and s.p_full + s.p_near < 1 - 1e-6:
        words.append('--w_dimo, --p_full and --p_near below 1')
    if needs_small_rewards(vars(s)):
        words.append('--w_clip or --held_out=')
    return words + published_in_use(s)


def handed_on(settings):
    """The generator that the run starts from, and what its checkpoint says: teacher, paths, the
    generator's settings."""
    folder = out_folder(settings['out_dir'], settings['teacher'])
    start = settings['init'] or os.path.join(folder, 'distill.pt')
    if settings['bench'] and settings['teacher_path'] == 'random':
        return dict(init=start)
    return dict(settings_of(start, INHERITED), init=start)


def load_start(folder, run):
    """-> the teacher with what surrounds it, the rewards too; the checkpoint that generator and
    auxiliary model start from."""
    path = teacher_file(teacher, teacher_path, teacher_ckpt, folder, init)
    if bench and teacher_path == 'random':
        loaded = load_teacher(teacher, path, tokenizer_path, '', teacher_heads, run.device, text_path or 'random')
        if needs_small_rewards(globals()):
            raise ValueError('--teacher_path=random has no data to train the small rewards on; add --w_clip=0 '
                             '--held_out=none --w_clipscore=1 --clip_path=random')
        loaded.rewards = load_rewards(globals(), '', run.device)
        weights = loaded.net.state_dict()
        return loaded, dict(stage='model', ema=weights, aux=weights)
    start = load_checkpoint(init, 'distill|gan|reward', 'Make it with: python distill.py', fallback=True)
    if not start['data'] and needs_small_rewards(globals()):
        raise ValueError(f'{init}: was made without data, which the small rewards are trained on; use published ones, '
                         'as in --w_clip=0 --w_hps=5 --held_out=pick')
    loaded = load_teacher(teacher, path, tokenizer_path, data or start['data'], teacher_heads, run.device, text_path,
                          prompts, teacher_grid)
    same_origin(loaded, start, init)
    note_unfinished(start, init)
    loaded.origin['start'] = hash_of_weights(start['ema'])
    world_file = os.path.join(folder, 'rewards.pt')
    if needs_small_rewards(globals()):
        make_rewards(world_file, loaded, globals(), run)
    loaded.rewards = load_rewards(globals(), world_file, run.device)
    loaded.held_out = load_held_out(globals(), world_file, run.device)
    return loaded, start


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals(), RECIPES, handed_on)
    run = start_run(batch_size, micro_batch)
    stage, folder = 'reward', out_folder(out_dir, teacher)
    out = os.path.join(folder, f'{stage}.pt')
    if os.path.abspath(init) == os.path.abspath(out):
        raise ValueError(f'--init={init} would be overwritten; choose another --out_dir')
    if not bench:
        claim(out, resume or overwrite)
    loaded, start = load_start(folder, run)
    if not loaded.rewards:
        raise ValueError('every reward has weight 0; give one, as in --w_clip=10')
    loaded.choose_decoder(run, half_decoder, grad_checkpoint)

    # Build the networks
    nets = SimpleNamespace(teacher=loaded.net)
    nets.generator = copy_of(loaded.net, start['ema'], stage, True, freeze_tables, grad_checkpoint)
    nets.generator_ema = copy_of(loaded.net, start['ema'], stage)
    nets.aux = copy_of(loaded.net, start['aux'], stage, True, freeze_tables, grad_checkpoint)
    start_net = copy_of(loaded.net, start['ema'], stage)

    # Build the optimizers
    optimizers, betas = {}, (beta1, beta2)
    optimizers['generator'] = make_optimizers(nets.generator, generator_muon, generator_lr, betas,
                                              weight_decay)
    optimizers['aux'] = make_optimizers(nets.aux, aux_muon, aux_lr, betas, momentum=aux_momentum)

    # Resume
    step, smooth = 0, {}
    history, best = [], {}                             # measurements; the average at its best one
    if resumes(resume, out):
        state = load_resumed(out, stage, config)
        same_origin(loaded, state, out)
        restore(nets.generator, state['net'], out, 'net')
        restore(nets.generator_ema, state['average'], out, 'average')
        restore(nets.aux, state['aux'], out, 'aux')
        restore_optimizers(optimizers, state['optimizers'], out)
        step = state['step']
        smooth = {key: value.to(run.device) for key, value in state['smooth'].items()}
        history, best = state['history'], state['ema']
    same_weights(nets.generator, nets.generator_ema, nets.aux)
    if compile:
        compile_blocks(nets.teacher, nets.generator, nets.aux, twice=bool(image_clip))

    # Print the plan
    if run.rank == 0:
        print(f'generator {millions(nets.generator):.2f} M parameters')
        print(f'{steps} updates of {batch_size} = {run.world} x {run.accumulate} x {run.micro}')
        weights = ' + '.join(f'{weight:g} {name}' for name, (weight, _) in loaded.rewards.items())
        print(f'rewards {weights} ({relax}), Di[M]O {w_dimo:g}, from {init}')
    if bench:
        def bench_step():
            update(nets, optimizers, loaded, run, step)
        report_bench(bench_step, batch_size, run)
        raise SystemExit
    log = Log(out, step) if run.rank == 0 else None

    # Choose what to show and to measure
    reference = Judged.of(loaded, folder, n_reference)
    shown = reference.prompts(32)[0][:16]
    most = min(teacher_steps, nets.teacher.N)
    one_pass = student_sampler(nets.generator_ema, r_init, sigma_init, tau_sample)
    compared = student_sampler(start_net, r_init, sigma_init, tau_sample)
    if run.rank == 0:
        compared_grid, _ = render(compared, loaded, shown, seed)

    turned = False
    stop = Stop()
    bar = progress(steps, stage, step)
    while True:
        ending = step >= steps or stop.now(step, run.device)
        if run.rank == 0 and (step % save_every == 0 or ending):
            # Measure
            if not is_measured(history, step) and (step % save_every == 0 or step >= steps):
                captions, _ = reference.prompts(min(500, n_eval))
                row = reference.measure(render(one_pass, loaded, captions, seed)[0], captions)
                bar.write(f'step {step}: {in_short(row)}')
                # Keep the best by held-out reward
                if not history or not patience or row['held_out'] > max(h['held_out'] for h in history):
                    best = {key: value.clone() for key, value in nets.generator_ema.state_dict().items()}
                bar.write(f'step {step}: reward {row["reward"]:.3f}, held-out {row["held_out"]:.3f}')
                history.append(dict(step=step, **{key: row[key] for key in MEASURED}))
            # Save
            state = dict(loaded.pack(), stage=stage, step=step, config=config, smooth=smooth)
            state.update(net=nets.generator.state_dict(), ema=best)     # ema is what gets sampled
            state.update(aux=nets.aux.state_dict(), optimizers=optimizer_states(optimizers))
            state.update(average=nets.generator_ema.state_dict(), history=history)
            if step:
                save_checkpoint(out, state)
            # Show
            grid, _ = render(one_pass, loaded, shown, seed)
            picture = f'{folder}/{stage}-{step:06d}.png'
            save_grid(picture, torch.cat([compared_grid, grid]), shown * 2)
            bar.write(f'step {step}: grid in {picture}')
            turned = has_turned([row['held_out'] for row in history], patience)
        turned = agreed(turned, step % save_every == 0, run)
        if ending or turned:
            break
        # -------------------------------------------------------------------------
        numbers, logits, images, captions = update(nets, optimizers, loaded, run, step)
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
            numbers.update(reference.judge(images, captions), toy_fd=history[-1]['toy_fd'])
            row = rounded({**numbers, **smooth, 'entropy': entropy, 'max_prob': top})
            bar.set_postfix({key: row[key] for key in SHOWN if key in row}, refresh=False)
            log.write(dict(step=step, **row))
    bar.close()
    stop.over()

    # Print the table
    if run.rank == 0 and (step >= steps or turned):
        restore(nets.generator_ema, best, out, 'ema')
        if patience:
            kept = max(history, key=held_out_of)['step']
            print(f'kept: step {kept}, where the held-out reward was highest; stopped at {step}')
        samplers = {}
        passes = teacher_passes(nets.teacher, most, teacher_cfg)
        sampler = teacher_sampler(nets.teacher, most, teacher_cfg, teacher_gumbel)
        plural = 's' if most > 1 else ''
        samplers[f'teacher, {most} step{plural}'] = passes, sampler
        samplers[f'start, {start["stage"]}'] = 1, compared
        samplers['rewarded, 1 step'] = 1, one_pass
        final_table(out[:-3], samplers, loaded, reference, n_eval, seed, config)
    end_run()
