"""
Stage 1, Di[M]O (arXiv 2503.15457): distil a masked diffusion teacher of many steps into a generator of one.

Left out against the official trainer: dropout in the teacher's targets, the mean/sum and hard/soft variants of its
losses, FID inside the loop (a toy metric stands in), NaN repair. Changed: one generator pass serves both updates,
one auxiliary pass both losses: 8 forward-equivalents per guided step instead of 10, a backward counting two
(--reuse=false: the released order); each re-masking hides all or nearly all, as choices of the whole image are judged
only there (--p_full=0 --p_near=0: the paper's law). No real data enters: the loop sees captions, the teacher, and its
own samples.

$ python distill.py                                     # all of it on a laptop: trains tokenizer and teacher if missing
$ python distill.py --data=my_images --out_dir=out/mine # the same on your folder (sub-folders are classes)
$ python distill.py --steps=20 --n_eval=200 --teacher_ckpt=out/model.pt --out_dir=out/smoke   # smoke test, seconds
$ python distill.py --teacher=maskgit --teacher_path=... --tokenizer_path=...   # published weights, see README.md
$ torchrun --nproc_per_node=8 distill.py --batch_size=1024 --generator_lr=1e-5 --aux_lr=1e-5 --ema_decay=0.9999
Expected (2 CPU cores, shapes world): see the results table in README.md, which this command prints at its end.
"""
import os
import signal
import subprocess
import sys

import torch
import torch.distributed as dist

from model import (MDM, Images, Log, Reference, Stop, Tokenizer, apply_gradients, aux_loss, check_finite,
                   compile_blocks, configure, dimo_grad, ema_update, end_processes, final_table, guided_logits,
                   jeffreys, load_checkpoint, load_resumed, load_teacher, make_optimizers, one_step, progress, remask,
                   render, report_bench, restore, restore_optimizers, rng_for, same_tokens, same_weights,
                   sample_teacher, save_checkpoint, save_grid, set_rate, split_batch, start_processes, surrogate,
                   teacher_passes, token_entropy, word_ids)
from tokenizer import WORLDS, previous

# -----------------------------------------------------------------------------
# I/O
data = 'shapes'        # 'shapes', 'shapes-open' or a folder; only used to train a missing teacher and to measure
out_dir = 'out'        # tokenizer.pt and model.pt are found (or made) here; distill.pt, log and pictures go here
teacher = 'ours'       # ours (out_dir/model.pt), or published weights: maskgit or maskbit
teacher_path = ''      # file of a published teacher; random = random weights of its size, to time it
tokenizer_path = ''    # file of its tokenizer
teacher_heads = 0      # attention heads of a published teacher, which its file does not tell; 0 = 16
teacher_ckpt = ''      # another teacher of ours than out_dir/model.pt
resume = False         # continue from out_dir/distill.pt to the same bits
seed = 0               # every random number of the run follows from it
log_every = 25         # steps between log lines
save_every = 200       # steps between checkpoints, sample grids and toy FD of 500 images
n_eval = 2000          # images behind each row of the final table
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
# Di[M]O
steps = 3000           # generator updates
batch_size = 32        # images per update, all processes together; paper 64
micro_batch = 0        # images per forward pass on one device, 0 = as many as fit one pass; lower it to save memory
generator_lr = 3e-4    # Adam; paper 1e-5 on everything (174 M parameters)
aux_lr = 5e-4          # Adam; the auxiliary model must follow the generator; paper 1e-5 on everything
generator_muon = 0.004  # Muon on the matrices of the trunk; 0 = Adam on everything, as in the paper
aux_muon = 0.01        # the same for the auxiliary model: higher rates make it too noisy to see what is coupled
aux_momentum = 0.8     # its Muon's, less than the generator's .95 to follow it sooner
beta1 = 0.9            # Adam
beta2 = 0.99           # Adam; paper .999
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
# the teacher in the final table (sample.py --sweep finds its best; README.md has a sweep)
teacher_steps = 16     # most steps of the table; it also shows 1 and 4
teacher_cfg = 1.5      # guidance at the last step, rising from 1
teacher_gumbel = 8.0   # Gumbel temperature of the confidence, falling to 0
# system
compile = False        # torch.compile the blocks of the three networks
grad_checkpoint = False  # recompute the blocks of generator and auxiliary in backward: less memory, a third more time
bench = False          # time 20 steps and stop
# -----------------------------------------------------------------------------

def train_missing(data, out_dir, seed):
    """Train tokenizer and teacher of the demo in out_dir if they are missing, or finish them if interrupted."""
    def saved(script):
        path = os.path.join(out_dir, f'{script}.pt')
        there = os.path.exists(path) or os.path.exists(previous(path))
        state = load_checkpoint(path, script, 'Delete it to train it again.', fallback=True) if there else None
        if state and state['config']['data'] != data:
            raise SystemExit(f'{path} was trained on {state["config"]["data"]}, not on {data}; give each data set a '
                             f'folder of its own, --out_dir=out/{os.path.basename(data)}, or, if the same images have '
                             f'only moved: --teacher_ckpt={out_dir}/model.pt')
        return path, state, state is not None and state['step'] >= state['config']['steps']

    complete = saved('model')[2]                                              # it holds its tokenizer
    for script, minutes in () if complete else (('tokenizer', 3), ('model', 4)):
        path, state, done = saved(script)
        if not done:
            print(f'{path} is {"unfinished" if state else "missing"}: running {script}.py first, expected '
                  f'{minutes} minutes on 2 CPU cores', flush=True)
            settings = {**state['config'], 'resume': True} if state else {'data': data, 'seed': seed}
            command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), f'{script}.py'),
                       *(f'--{k}={v}' for k, v in {**settings, 'out_dir': out_dir}.items())]
            single = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
            child = subprocess.Popen(command, env=single)
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())       # it saves and ends, and so do we
            try:
                child.wait()
            except KeyboardInterrupt:                                         # the child got it too, and saves
                child.wait()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not saved(script)[2]:
                raise SystemExit(f'{script}.py did not finish (see above); the same command continues it')


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals())
    rank, world, device, autocast = start_processes()
    micro, accumulate = split_batch(batch_size, micro_batch, world)
    out = os.path.join(out_dir, 'distill.pt')
    ours = teacher == 'ours'
    if rank == 0 and ours and not teacher_ckpt:
        train_missing(data, out_dir, seed)
    if world > 1:
        dist.barrier()
    teacher_path = (teacher_ckpt or os.path.join(out_dir, 'model.pt')) if ours else teacher_path
    packed = load_teacher(teacher, teacher_path, tokenizer_path, data, teacher_heads)
    if data not in WORLDS:
        packed['data'] = data                                                 # the teacher's, which may have moved
    tokenizer = Tokenizer.from_checkpoint(packed['tokenizer']).to(device)
    words, prompts = packed['words'], packed['prompts'].long().to(device)     # prompts (M, T), the training captions

    # Networks: teacher (phi), generator (theta) and its average, auxiliary (psi), all started from the teacher
    teacher, generator, generator_ema, aux = (MDM(**packed['args']).to(device) for _ in range(4))
    for network in (teacher, generator, generator_ema, aux):
        restore(network, packed['ema'], teacher_path, 'ema')
    teacher.eval().requires_grad_(False)
    generator_ema.eval().requires_grad_(False)
    for network in (generator, aux):
        network.checkpointing = grad_checkpoint
        for table in network.embedding_parameters() if freeze_tables else []:
            table.requires_grad_(False)
    trained = [[p for p in network.parameters() if p.requires_grad] for network in (generator, aux)]
    optimizers = [make_optimizers(generator, generator_muon, generator_lr, (beta1, beta2)),
                  make_optimizers(aux, aux_muon, aux_lr, (beta1, beta2), momentum=aux_momentum)]
    step, stop, smooth = 0, Stop(), {}
    if resume:
        state = load_resumed(out, 'distill', config)
        same_tokens(packed, state, teacher_path, out)
        for name, network in (('net', generator), ('ema', generator_ema), ('aux', aux)):
            restore(network, state[name], out, name)
        restore_optimizers(optimizers[0] + optimizers[1], state['optimizers'], out)
        step, smooth = state['step'], {k: v.to(device) for k, v in state['smooth'].items()}
    same_weights(generator, generator_ema, aux)
    if compile:
        compile_blocks(teacher, generator, aux)

    # The printed plan
    teacher_steps = min(teacher_steps, teacher.N)
    log = Log(out, step) if rank == 0 and not bench else None
    reference = None                                                          # published teachers may have no data
    if packed['data']:
        reference = Reference(Images(packed['data'], tokenizer.config['image_size'], expected=words), n_reference)
    shown = reference.prompts(32)[0] if reference else [words[int(k)] for k in torch.linspace(0, len(words) - 1, 32)]
    if rank == 0:
        print(f'3 x {sum(p.numel() for p in generator.parameters()) / 1e6:.2f} M parameters, {steps} updates of '
              f'{batch_size} = {world} x {accumulate} x {micro}, each of '
              f'{7 + 2 * (not reuse) + (cfg_scale != 1)} forward-equivalents')

    def draw_batch(rng):
        """Captions, and what the generator makes of them: cond (B, T), logits (B, N, V), tokens (B, N)."""
        cond = prompts[torch.randint(len(prompts), (micro,), generator=rng, device=device)]
        with autocast:
            return cond, *one_step(generator, cond, r_init, sigma_init, tau, rng)

    def update():
        """One Di[M]O step: generator and auxiliary update -> the numbers for the log."""
        falling = max(0.05, (1 - step / steps) / cooldown) if cooldown else 1
        set_rate(optimizers[0] + optimizers[1], min(1, (step + 1) / max(1, warmup), falling))
        generator.zero_grad()
        aux.zero_grad()
        # Generator: at x_t, move z along the gradient of D(teacher || aux) at the auxiliary logits
        for k in range(accumulate):
            rng = rng_for(seed, step, rank * accumulate + k, device)
            cond, logits, tokens = draw_batch(rng)
            x_t, mask = remask(tokens, generator.mask_id, schedule, rng, p_full, p_near)
            with torch.no_grad(), autocast:
                teacher_logits = guided_logits(teacher, x_t, cond, cfg_scale)
            with torch.set_grad_enabled(reuse), autocast:
                aux_logits = aux(x_t, cond)
            grad = dimo_grad(teacher_logits, aux_logits.detach(), mask, beta)
            surrogate(logits, grad).backward()
            # Auxiliary: the same pass at x_t, now with its own loss
            if reuse:
                psi_loss = aux_loss(aux_logits, tokens, mask, label_smoothing)
                psi_loss.backward()
        norms = [finish(0)]
        if not reuse:
            for k in range(accumulate):
                rng = rng_for(seed, step, ('fresh', rank * accumulate + k), device)
                with torch.no_grad():
                    cond, _, tokens = draw_batch(rng)
                x_t, fresh_mask = remask(tokens, generator.mask_id, schedule, rng, p_full, p_near)
                with autocast:
                    psi_loss = aux_loss(aux(x_t, cond), tokens, fresh_mask, label_smoothing)
                psi_loss.backward()
        norms.append(finish(1))
        ema_update(generator_ema, generator, ema_decay, step)
        divergence = (jeffreys(teacher_logits, aux_logits.detach(), mask, beta).sum() / mask.sum()
                      if (step + 1) % log_every == 0 else None)
        return dict(divergence=divergence, aux_loss=psi_loss.detach(), grad_logits=grad.norm() / micro,
                    norm_generator=norms[0], norm_aux=norms[1]), logits.detach()

    finish = lambda k: apply_gradients(trained[k], optimizers[k], accumulate * world, clip)  # -> gradient norm

    if bench:
        report_bench(update, batch_size, device, autocast)
        raise SystemExit
    student = lambda cond, rng: one_step(generator_ema, cond, r_init, sigma_init, tau_sample, rng)[1]
    many_steps = lambda n: lambda cond, rng: sample_teacher(teacher, cond, n, teacher_cfg, teacher_gumbel, rng=rng)
    conditions = lambda captions: word_ids(captions, words, prompts.shape[1])
    teacher_grid = render(many_steps(teacher_steps), tokenizer, conditions(shown[:16]), seed)[0] if rank == 0 else None
    bar = progress(steps, 'distill', step)
    while True:
        # Save, show, measure, stop
        ending = step >= steps or stop.now(step, device)
        if rank == 0 and (step % save_every == 0 or ending):
            if step:
                save_checkpoint(out, dict(
                    stage='distill', step=step, config=config, args=generator.config, words=words, data=packed['data'],
                    prompts=packed['prompts'], tokenizer=tokenizer.pack(), net=generator.state_dict(),
                    ema=generator_ema.state_dict(), aux=aux.state_dict(), smooth=smooth,
                    optimizers=[o.state_dict() for o in optimizers[0] + optimizers[1]]))
            grid, _ = render(student, tokenizer, conditions(shown[:16]), seed)
            save_grid(f'{out_dir}/distill-{step:06d}.png', torch.cat([teacher_grid, grid]), shown[:16] * 2)
            note = f'step {step}: grid in {out_dir}/distill-{step:06d}.png'
            if reference:
                captions, _ = reference.prompts(min(500, n_eval))
                row = reference.measure(render(student, tokenizer, conditions(captions), seed)[0], captions)
                note += f', toy FD {row["toy_fd"]:.2f}, prompt followed {row["accuracy"]:.3f} ({row["n"]} images)'
            bar.write(note)
        if ending:
            break
        # -------------------------------------------------------------------------
        numbers, logits = update()
        for key in ('aux_loss', 'grad_logits'):
            smooth[key] = torch.lerp(smooth[key], numbers[key], 0.05) if key in smooth else numbers[key]
        step += 1
        bar.update()
        if rank == 0 and (step % log_every == 0 or step % save_every == 0 or step == steps):
            check_finite(step, generator_lr=numbers['norm_generator'], aux_lr=numbers['norm_aux'])
        if step % log_every == 0 and rank == 0:  # norms are of all processes, the rest of the last micro-batch here
            entropy, top = token_entropy(logits)
            row = {k: round(float(v), 5) for k, v in {**numbers, **smooth, 'entropy': entropy, 'max_prob': top}.items()}
            row = dict(step=step, **row)
            bar.set_postfix({k: row[k] for k in ('divergence', 'aux_loss', 'entropy')}, refresh=False)
            log.write(row)
    bar.close()

    # The table
    if rank == 0 and step >= steps and not reference:
        print(f'no data, no table; measure with: python sample.py --ckpt {out} --metrics --inception=FILE --ref=FILE')
    elif rank == 0 and step >= steps:
        samplers = {f'teacher, {n} steps': (teacher_passes(teacher, n, teacher_cfg), many_steps(n))
                    for n in sorted({1, min(4, teacher_steps), teacher_steps})}
        final_table(out[:-3], {**samplers, 'student, 1 step': (1, student)}, tokenizer, reference, conditions, n_eval,
                    seed, config)
    end_processes()
