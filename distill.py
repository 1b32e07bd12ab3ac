"""
Stage 1, Di[M]O (arXiv 2503.15457): distil a masked diffusion teacher of many steps into a generator of one.

Left out against the official trainer: dropout in the teacher's targets, the mean/sum and hard/soft
variants of its losses, FID inside the loop (a toy metric stands in), NaN repair. Changed: one
generator pass serves both updates, one auxiliary pass both losses: 8 forward-equivalents per guided
step instead of 10, a backward counting two (--reuse=false: the released order); each re-masking
hides all or nearly all, as choices of the whole image are judged only there (--p_full=0 --p_near=0:
the paper's law). No real data enters: the loop sees captions, the teacher, and its own samples.

$ python distill.py                                     # all of it on a laptop: trains tokenizer and teacher if missing
$ python distill.py --data=my_images --out_dir=out/mine # the same on your folder (sub-folders are classes)
$ python distill.py --steps=20 --n_eval=200 --teacher_ckpt=out/model.pt --out_dir=out/smoke   # smoke test, seconds
$ torchrun --nproc_per_node=8 distill.py --teacher=maskbit --teacher_path=FILE --tokenizer_path=FILE   # the paper's run
Expected (2 CPU cores, shapes world): the table that assets/RESULTS.md shows, printed at its end.
"""
import os
from types import SimpleNamespace

import torch

from common.files import (Log, claim, load_resumed, optimizer_states, restore, restore_optimizers,
                          resumes, save_checkpoint)
from common.metrics import Reference, final_table, in_short, render
from common.pictures import save_grid
from common.run import (Stop, check_finite, compile_blocks, configure, ema_update, end_run,
                        make_optimizers, meet, micro_rng, millions, out_folder, progress,
                        rate_law, report_bench, rounded, same_weights, set_rates, smoothed, start_run,
                        take_step)
from common.teachers import copy_of, load_teacher, same_origin, teacher_file, train_missing
from model import (aux_loss, dimo_grad, guided_logits, jeffreys, teacher_sampler, one_step, remask,
                   student_sampler, surrogate, teacher_passes, token_entropy)

# -----------------------------------------------------------------------------
# I/O
data = ''              # 'shapes', 'shapes-open' or a folder, to train a missing teacher ('' = shapes) and to measure;
                       # '' = what the teacher that is there was trained on
out_dir = ''           # distill.pt, log and pictures go here, '' = out/ or out/NAME of the teacher; ours is found (or made) here
teacher = 'ours'       # ours (out_dir/model.pt), or published: maskgit, maskbit, maskgen, meissonic (recipes below)
teacher_path = ''      # file of a published teacher; random = random weights of its size, to time it
tokenizer_path = ''    # file of its tokenizer
teacher_heads = 0      # attention heads of a published teacher, which its file does not tell; 0 = as published
text_path = ''         # CLIP text encoder of maskgen, meissonic: folder (weights, word files) or hub id
prompts = ''           # file of prompts that these train on (.txt, .jsonl, .json, .csv), '' = captions of --data
teacher_grid = 0       # tokens a side of a Meissonic, which its file does not tell; 0 = as published
teacher_ckpt = ''      # another teacher of ours than out_dir/model.pt
resume = False         # continue from out_dir/distill.pt to the same bits
overwrite = False      # a distill.pt that is there may be replaced by a new run
seed = 0               # every random number of the run follows from it
log_every = 25         # steps between log lines
save_every = 500       # steps between checkpoints, sample grids and distances of 500 images
n_eval = 2000          # images behind each row of the final table, a quarter where the sampler is slow
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
# Di[M]O
steps = 3000           # generator updates
batch_size = 32        # images per update, all processes together; paper 64
micro_batch = 0        # images per forward pass on one device, 0 = all; lower it to save memory
generator_lr = 3e-4    # Adam; paper 1e-5 on everything (174 M parameters)
aux_lr = 5e-4          # Adam; the auxiliary model must follow the generator; paper 1e-5 on everything
generator_muon = 0.004  # Muon on the matrices of the trunk; 0 = Adam on everything, as in the paper
aux_muon = 0.01        # the same for the auxiliary model: higher rates make it too noisy to see what is coupled
aux_momentum = 0.8     # its Muon's, less than the generator's .95 to follow it sooner
beta1 = 0.9            # Adam
beta2 = 0.99           # Adam; paper .999
weight_decay = 0.0     # of the generator; paper 0
warmup = 50            # steps of linear warm-up; paper 100
cooldown = 1.0         # last share of the steps over which the rates fall to 5 %; paper 0
clip = 1.0             # largest gradient norm, each network, 0 = none; paper 1
r_init = 0.9           # masked share of the generator's input; paper .6 (MaskGIT), .5 (Meissonic)
sigma_init = 0.03      # std of the noise on its token embeddings; paper .1 (MaskGIT), .3 (Meissonic)
beta = 0.1             # generalized Jeffreys: 0 forward KL, 1 reverse KL; released MaskGIT run -0.2
cfg_scale = 1.0        # teacher guidance u + s (c - u), 1 = none; paper 2 (MaskGIT)
tau = 1.0              # temperature of the one-step sample in training
tau_sample = 0.3       # the same in pictures and tables: tokens agree better, x_init keeps the variety
p_full = 0.25          # share of re-maskings that hide everything, where global choices are judged; paper 0
p_near = 0.75          # share that shows 1 to N / 8 tokens, where independent choices are told apart; paper 0
schedule = 'arccos'    # law of the ratio of the others, none by default: arccos (MaskGIT) or cosine (Meissonic)
label_smoothing = 0.0  # in the auxiliary loss; released code .1
ema_decay = 0.995      # averaged generator, which is what gets sampled; paper .9999
freeze_tables = True   # keep the embedding tables of generator and auxiliary at the teacher's
reuse = True           # one generator pass for both updates; False: the released order, a fresh pass for the auxiliary
# the teacher in the final table (sample.py --sweep finds its best)
teacher_steps = 16     # most steps of the table; it also shows 1 and 4
teacher_cfg = 1.5      # guidance at the last step, rising from 1
teacher_gumbel = 8.0   # Gumbel temperature of the confidence, falling to 0
# system
compile = False        # torch.compile the blocks of the three networks
grad_checkpoint = False  # recompute the blocks of generator and auxiliary in backward: less memory, a third more time
bench = False          # time 20 steps and stop

# What --teacher=NAME changes: the paper's values; steps is our guess (watch FID)
RECIPES = {
    'maskgit': dict(
        steps=30_000, batch_size=64, generator_lr=1e-5, aux_lr=1e-5, generator_muon=0.0,
        aux_muon=0.0, beta2=0.999, warmup=100, cooldown=0.0, r_init=0.6, sigma_init=0.1, beta=-0.2,
        cfg_scale=2.0, tau_sample=1.0, p_full=0.0, p_near=0.0, label_smoothing=0.1,
        ema_decay=0.9999, save_every=1000, log_every=50, teacher_steps=8, teacher_cfg=4.0,
        teacher_gumbel=4.5),
    'maskbit': dict(
        steps=30_000, batch_size=64, generator_lr=1e-5, aux_lr=1e-5, generator_muon=0.0,
        aux_muon=0.0, beta2=0.999, warmup=100, cooldown=0.0, r_init=0.6, sigma_init=0.1, beta=0.0,
        cfg_scale=2.0, tau_sample=1.0, p_full=0.0, p_near=0.0, label_smoothing=0.1,
        ema_decay=0.9999, save_every=1000, log_every=50, teacher_steps=64, teacher_cfg=8.1,
        teacher_gumbel=7.8),
    # text to image. Meissonic: as released by Di[M]O. MaskGen: r_init is the paper's; guidance is our choice
    'maskgen': dict(
        steps=50_000, batch_size=64, generator_lr=1e-6, aux_lr=1e-6, generator_muon=0.0,
        aux_muon=0.0, beta2=0.999, warmup=100, cooldown=0.0, r_init=0.95, sigma_init=0.1, beta=0.0,
        cfg_scale=4.0, tau_sample=1.0, p_full=0.0, p_near=0.0, label_smoothing=0.1,
        ema_decay=0.9999, save_every=1000, log_every=50, teacher_steps=16, teacher_cfg=13.0,
        teacher_gumbel=2.0),
    'meissonic': dict(
        steps=20_000, batch_size=16, micro_batch=2, grad_checkpoint=True, generator_lr=1e-6,
        aux_lr=1e-6, generator_muon=0.0, aux_muon=0.0, beta2=0.999, warmup=100, cooldown=0.0,
        r_init=0.5, sigma_init=0.3, beta=0.0, cfg_scale=4.0, tau_sample=1.0, p_full=0.0, p_near=0.0,
        schedule='cosine', label_smoothing=0.1, ema_decay=0.9999, save_every=1000, log_every=50,
        teacher_steps=64, teacher_cfg=9.0, teacher_gumbel=2.0)}

LIMITS = dict(         # a number is the least value, a pair a range, words a choice
    teacher=('ours', 'maskgit', 'maskbit', 'maskgen', 'meissonic'), log_every=1, save_every=1, n_eval=4, n_reference=4,
    steps=1, batch_size=1, micro_batch=0, generator_lr=0, aux_lr=0, generator_muon=0, aux_muon=0,
    aux_momentum=(0, 1), beta1=(0, 0.999999), beta2=(0, 0.999999), weight_decay=0, warmup=0,
    cooldown=(0, 1), clip=0, r_init=(0, 1), sigma_init=(0, 1), tau=1e-6, tau_sample=1e-6,
    p_full=(0, 1), p_near=(0, 1), schedule=('arccos', 'cosine'), label_smoothing=(0, 1),
    ema_decay=(0, 1), teacher_steps=1)

# What counts only with a choice of `in_use` below; what is named nowhere always counts
PUBLISHED = 'teacher_path tokenizer_path teacher_heads'
USES = {
    '--teacher=ours': 'teacher_ckpt',
    '--teacher=maskgit': PUBLISHED,
    '--teacher=maskbit': PUBLISHED,
    '--teacher=maskgen': f'{PUBLISHED} text_path prompts',
    '--teacher=meissonic': f'{PUBLISHED} text_path prompts teacher_grid',
    '--aux_muon': 'aux_momentum',
    '--p_full and --p_near below 1': 'schedule'}
# -----------------------------------------------------------------------------
# This stage's equations. nets: teacher (phi), generator (theta), generator_ema, aux (psi)

SMOOTHED = ('aux_loss', 'grad_logits')                 # logged as running means
SHOWN = ('divergence', 'aux_loss', 'entropy')          # beside the progress bar


def draw_batch(nets, loaded, run, rng):
    """Training captions, and what the generator makes of them -> cond, logits (B, N, V), tokens (B,
    N)."""
    index = torch.randint(len(loaded.prompts), (run.micro,), generator=rng, device=run.device)
    captions = [loaded.prompts[k] for k in index.tolist()]
    cond = loaded.encode_batch(captions)
    with run.autocast:
        logits, tokens = one_step(nets.generator, cond, r_init, sigma_init, tau, rng)
    return cond, logits, tokens


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


def released_aux_loss(nets, loaded, run, step, k):
    """The released order: the auxiliary model learns from a draw of its own, a generator pass
    more."""
    rng = micro_rng(seed, step, k, run, 'fresh')
    with torch.no_grad():
        cond, _, tokens = draw_batch(nets, loaded, run, rng)
    x_t, mask = remask(tokens, nets.generator.mask_id, schedule, rng, p_full, p_near)
    with run.autocast:
        aux_logits = nets.aux(x_t, cond)
    return aux_loss(aux_logits, tokens, mask, label_smoothing)


def update(nets, optimizers, loaded, run, step):
    """One Di[M]O step: generator and auxiliary update -> numbers for the log, logits (B, N, V)."""
    # Set the learning rates
    set_rates(optimizers['generator'] + optimizers['aux'], rate_law(step, steps, warmup, cooldown))
    # Accumulate gradients
    nets.generator.zero_grad()
    nets.aux.zero_grad()
    numbers = {}
    for k in range(run.accumulate):
        rng = micro_rng(seed, step, k, run)
        cond, logits, tokens = draw_batch(nets, loaded, run, rng)
        # Generator: move z along the gradient of D(teacher || aux) at x_t
        x_t, mask = remask(tokens, nets.generator.mask_id, schedule, rng, p_full, p_near)
        with torch.set_grad_enabled(reuse), run.autocast:
            grad, aux_logits = dimo_gradient(nets, x_t, mask, cond)
        surrogate(logits, grad).backward()
        # Auxiliary: the same pass at x_t, now with its own loss
        if reuse:
            psi_loss = aux_loss(aux_logits, tokens, mask, label_smoothing)
            psi_loss.backward()
    # Look at the divergence
    if (step + 1) % log_every == 0:
        with run.autocast:
            numbers['divergence'] = divergence(nets, x_t, mask, cond)
    # Update weights
    numbers['norm_generator'] = take_step(nets.generator, optimizers['generator'], run, clip)
    if not reuse:
        for k in range(run.accumulate):
            psi_loss = released_aux_loss(nets, loaded, run, step, k)
            psi_loss.backward()
    numbers['norm_aux'] = take_step(nets.aux, optimizers['aux'], run, clip)
    # Update the average
    ema_update(nets.generator_ema, nets.generator, ema_decay, step)
    numbers.update(aux_loss=psi_loss.detach(), grad_logits=grad.norm() / run.micro)
    return numbers, logits.detach()


def in_use(s):
    """Which words of USES count with the settings `s`."""
    words = [f'--teacher={s.teacher}']
    if s.aux_muon:
        words.append('--aux_muon')
    if s.p_full + s.p_near < 1 - 1e-6:
        words.append('--p_full and --p_near below 1')
    return words


def load_start(folder, run):
    """-> the teacher with what surrounds it; the weights that generator and auxiliary model start
    from: its own. A missing teacher of ours is trained first."""
    if run.rank == 0 and teacher == 'ours' and not teacher_ckpt:
        train_missing(data, folder, seed)
    meet()
    path = teacher_file(teacher, teacher_path, teacher_ckpt, folder)
    loaded = load_teacher(teacher, path, tokenizer_path, data, teacher_heads, run.device, text_path, prompts,
                          teacher_grid)
    weights = loaded.net.state_dict()
    return loaded, dict(stage='model', ema=weights, aux=weights)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals(), RECIPES)
    run = start_run(batch_size, micro_batch)
    stage, folder = 'distill', out_folder(out_dir, teacher)
    out = os.path.join(folder, f'{stage}.pt')
    if not bench:
        claim(out, resume or overwrite)
    loaded, start = load_start(folder, run)

    # Build the networks
    nets = SimpleNamespace(teacher=loaded.net)
    nets.generator = copy_of(loaded.net, start['ema'], stage, True, freeze_tables, grad_checkpoint)
    nets.generator_ema = copy_of(loaded.net, start['ema'], stage)
    nets.aux = copy_of(loaded.net, start['aux'], stage, True, freeze_tables, grad_checkpoint)

    # Build the optimizers
    optimizers, betas = {}, (beta1, beta2)
    optimizers['generator'] = make_optimizers(nets.generator, generator_muon, generator_lr, betas,
                                              weight_decay)
    optimizers['aux'] = make_optimizers(nets.aux, aux_muon, aux_lr, betas, momentum=aux_momentum)

    # Resume
    step, smooth = 0, {}
    if resumes(resume, out):
        state = load_resumed(out, stage, config)
        same_origin(loaded, state, out)
        restore(nets.generator, state['net'], out, 'net')
        restore(nets.generator_ema, state['ema'], out, 'ema')
        restore(nets.aux, state['aux'], out, 'aux')
        restore_optimizers(optimizers, state['optimizers'], out)
        step = state['step']
        smooth = {key: value.to(run.device) for key, value in state['smooth'].items()}
    same_weights(nets.generator, nets.generator_ema, nets.aux)
    if compile:
        compile_blocks(nets.teacher, nets.generator, nets.aux)

    # Print the plan
    if run.rank == 0:
        print(f'generator {millions(nets.generator):.2f} M parameters')
        print(f'{steps} updates of {batch_size} = {run.world} x {run.accumulate} x {run.micro}')
    if bench:
        def bench_step():
            update(nets, optimizers, loaded, run, step)
        report_bench(bench_step, batch_size, run)
        raise SystemExit
    log = Log(out, step) if run.rank == 0 else None

    # Choose what to show and to measure
    reference = Reference.of(loaded, folder, n_reference)  # None: published teachers may have no data
    shown = reference.prompts(32)[0][:16] if reference else loaded.examples(16)
    most = min(teacher_steps, nets.teacher.N)
    one_pass = student_sampler(nets.generator_ema, r_init, sigma_init, tau_sample)
    compared = teacher_sampler(nets.teacher, most, teacher_cfg, teacher_gumbel)
    if run.rank == 0:
        compared_grid, _ = render(compared, loaded, shown, seed)

    stop = Stop()
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
            row = rounded({**numbers, **smooth, 'entropy': entropy, 'max_prob': top})
            bar.set_postfix({key: row[key] for key in SHOWN if key in row}, refresh=False)
            log.write(dict(step=step, **row))
    bar.close()
    stop.over()

    # Print the table
    if run.rank == 0 and step >= steps and reference:
        samplers = {}
        for n in sorted({1, min(4, most), most}):
            passes = teacher_passes(nets.teacher, n, teacher_cfg)
            sampler = teacher_sampler(nets.teacher, n, teacher_cfg, teacher_gumbel)
            plural = 's' if n > 1 else ''
            samplers[f'teacher, {n} step{plural}'] = passes, sampler
        samplers['student, 1 step'] = 1, one_pass
        final_table(out[:-3], samplers, loaded, reference, n_eval, seed, config)
    if run.rank == 0 and step and not reference:
        prompts_too = '' if loaded.classes else ' --prompts=FILE'
        print(f'no data, no table; measure with: python sample.py --ckpt {out} --metrics --inception=FILE --ref=FILE'
              f'{prompts_too}')
    end_run()
