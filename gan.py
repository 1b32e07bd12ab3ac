"""
Stage 2a, Soft-Di[M]O (arXiv 2509.22925): refine the one-step generator with a GAN.

The generator's logits enter the frozen teacher as soft embeddings, so a discriminator of light heads on the teacher's
features sends gradients back to the generator; the Di[M]O surrogate stays on as the regulariser. This is the first
stage that sees data. There is no official code to compare with; left out against other GANs on frozen features: R1
penalty, augmentation, batch statistics. One generator pass serves all updates; one pass of the teacher over real and
fake serves both players. Our choice: Muon on the heads' matrices, which learn the game first, alone.

$ python gan.py                                         # after distill.py; about 6 minutes on 2 CPU cores
$ python gan.py --steps=20 --n_eval=200 --init=out/distill.pt --teacher_ckpt=out/model.pt --out_dir=out/smoke
$ python gan.py --relax=st --init=out/distill.pt --teacher_ckpt=out/model.pt --out_dir=out/st    # straight-through
$ torchrun --nproc_per_node=8 gan.py --batch_size=1024 # published teachers: see README.md
Expected (2 CPU cores, shapes world): see the results table in README.md, which this command prints at its end.
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (MDM, Images, Log, Reference, Stop, Tokenizer, apply_gradients, aux_loss, both, check_finite,
                   compile_blocks, configure, dimo_grad, ema_update, end_processes, final_table, frechet_distance,
                   guided_logits, image_rngs, jeffreys, load_checkpoint, load_resumed, load_teacher, make_optimizers,
                   one_step, progress, random_numbers, random_positions, relaxation_bias, relaxed, remask, render,
                   report_bench, restore, restore_optimizers, rng_for, same_tokens, same_weights, sample_teacher,
                   save_checkpoint, save_grid, set_rate, split_batch, start_processes, surrogate, teacher_passes,
                   token_data, token_entropy, toy_features, word_ids)

# -----------------------------------------------------------------------------
# I/O
init = ''              # generator to start from, '' = out_dir/distill.pt; any distill.pt, gan.pt or reward.pt
data = ''              # real images, '' = what the teacher was trained on, or a folder
flips = False          # mirrored real images too, as MaskGIT and MaskBit were trained
out_dir = 'out'        # model.pt is found here; gan.pt, log and pictures go here
teacher = 'ours'       # ours (out_dir/model.pt), or published weights: maskgit or maskbit
teacher_path = ''      # file of a published teacher; random = random weights of its size, to time it
tokenizer_path = ''    # file of its tokenizer
teacher_heads = 0      # attention heads of a published teacher, which its file does not tell; 0 = 16
teacher_ckpt = ''      # another teacher of ours than out_dir/model.pt
resume = False         # continue from out_dir/gan.pt to the same bits
seed = 0               # every random number of the run follows from it
log_every = 50         # steps between log lines
save_every = 200       # steps between checkpoints, sample grids and toy FD of 1,000 images
n_eval = 2000          # images behind each row of the final table
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
# GAN
relax = 'soft'         # what the discriminator sees of the logits: soft (the paper), gumbel or st (straight-through)
tau_soft = 1.0         # temperature of that relaxation; the paper's soft embedding has 1
w_gan = 2.0            # weight of the GAN term per image, in the surrogate's sum convention; paper 200 (MaskBit)
w_dimo = 1.0           # weight of the Di[M]O surrogate, 0 = GAN only
r_max = 0.5            # masked share of real and fake, r ~ U[0, r_max]; paper .95 best, 0 worst
hinge = False          # hinge losses; False = non-saturating, as in the paper
disc_lr = 3e-3         # Adam on the heads' convolutions and biases; must learn faster than the generator
disc_muon = 0.02       # Muon on the heads' matrices; 0 = Adam on everything
disc_warmup = 200      # steps of the discriminator alone before the first update, a third of the cost of an update
disc_width = 256       # width of a head, at most the teacher's
spectral = False       # spectral norm on the heads' linear layers (one power iteration per micro-batch)
# Di[M]O
steps = 600            # generator updates
batch_size = 32        # images per update, all processes together; paper 64
micro_batch = 0        # images per forward pass on one device, 0 = as many as fit one pass; lower it to save memory
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
# -----------------------------------------------------------------------------
# The discriminator and its losses

def head_layers(depth):
    """Blocks that carry a head, counted from 1: three below depth 12, else four, evenly spaced up to the last."""
    n = 3 if depth < 12 else 4
    return sorted({max(1, depth * k // n) for k in range(1, n + 1)})


class Head(nn.Module):
    """One light head: hidden states (B, L, D), conditions (B, C) -> a logit per token (B, L). Neighbouring tokens are
    mixed by a depthwise 3x3 convolution; the condition enters as a projection (Miyato & Koyama 2018), from zero."""

    def __init__(self, D, width, L, C, spectral):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm if spectral else lambda layer: layer
        self.grid = math.isqrt(L)
        if self.grid ** 2 != L:
            raise ValueError(f'the heads mix tokens on a square grid; {L} tokens are none')
        self.enter, self.join = norm(nn.Linear(D, width)), norm(nn.Linear(width, width))
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.leave, self.score = norm(nn.Linear(width, 64)), nn.Linear(64, 1)
        self.condition = nn.Linear(C, 64)                                    # outside spectral norm: 0 / 0
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, h, c):
        h = F.leaky_relu(self.enter(F.layer_norm(h.float(), h.shape[-1:])), 0.2)         # (B, L, width)
        mixed = self.mix(h.transpose(1, 2).unflatten(2, (self.grid, self.grid))).flatten(2).transpose(1, 2)
        o = self.leave(F.leaky_relu((h + self.join(mixed)) / 2 ** 0.5, 0.2))             # (B, L, 64)
        return self.score(o)[..., 0] + (o * self.condition(c)[:, None]).sum(-1) / 8


class Discriminator(nn.Module):
    """Heads on the frozen teacher's hidden states: D(emb_r, r) of Soft-Di[M]O (arXiv 2509.22925). `states` is a list
    of (B, L, D), words (B, C) the flattened condition, r (B, 1) the masked share -> one logit per image (B,)."""

    def __init__(self, D, L, layers, C, width, spectral):
        super().__init__()
        self.heads = nn.ModuleList([Head(D, min(D, width), L, C + 32, spectral) for _ in layers])

    def forward(self, states, words, r):
        angle = r * torch.exp(torch.linspace(0, math.log(1000), 16, device=r.device))   # (B, 16)
        c = torch.cat([words.float(), angle.sin(), angle.cos()], 1)                      # (B, C + 32)
        return torch.stack([head(h, c).mean(1) for head, h in zip(self.heads, states)]).mean(0)


def disc_loss(real_logits, fake_logits, hinge):
    """The discriminator's loss from logits (B,) each: softplus(-D(real)) + softplus(D(fake)), or hinge."""
    if hinge:
        return (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).mean()
    return (F.softplus(-real_logits) + F.softplus(fake_logits)).mean()


def gan_loss(fake_logits, hinge):
    """The generator's loss: -log D(fake), non-saturating (Soft-Di[M]O, arXiv 2509.22925), or -D(fake) with hinge."""
    return -fake_logits.mean() if hinge else F.softplus(-fake_logits).mean()


def advice(row, first):
    """What the health numbers of a log line, beside those of the first line, ask for: a set of sentences."""
    asked = set()
    if row.get('acc_real', 0) + row.get('acc_fake', 0) > 1.8:
        asked.add('the discriminator is right in more than 90 % of the cases, so its gradient fades; lower --disc_lr, '
                  'raise --r_max, lower --w_gan if it oscillates, or try --relax=st while the entropy is high')
    if row['entropy'] < 0.5 * first['entropy'] and row['gap'] < 0.5 * first['gap']:
        asked.add('the entropy has halved: compare the toy FD lines; if it does not fall, the generator only sharpens '
                  'its logits: lower --w_gan, raise --r_max or try --relax=st')
    return asked


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals())
    rank, world, device, autocast = start_processes()
    micro, accumulate = split_batch(batch_size, micro_batch, world)
    if not w_gan and not w_dimo:
        raise SystemExit('gan.py: --w_gan=0 and --w_dimo=0 leave nothing to learn')
    if bias and world > 1:
        raise SystemExit('gan.py: --bias runs as one process; start it with python, not torchrun')
    out, init = os.path.join(out_dir, 'gan.pt'), init or os.path.join(out_dir, 'distill.pt')
    ours, untrained = teacher == 'ours', bench and teacher_path == 'random'   # untrained: time a published size
    teacher_path = (teacher_ckpt or os.path.join(out_dir, 'model.pt')) if ours else teacher_path
    if untrained:
        packed = load_teacher(teacher, teacher_path, tokenizer_path, data, teacher_heads)
        start = dict(packed, aux=packed['ema'], config=dict(r_init=0.6, sigma_init=0.1, tau=1.0, tau_sample=1.0))
    else:
        start = load_checkpoint(init, 'distill|gan|reward', 'Make it with: python distill.py', fallback=True)
        data = data or start['data']
        if not data:
            raise SystemExit('gan.py: the discriminator needs real images; give --data=FOLDER of class folders')
        packed = load_teacher(teacher, teacher_path, tokenizer_path, data, teacher_heads)
        same_tokens(packed, start, teacher_path, init)
    start['config'].setdefault('tau_sample', 1.0)                             # files made before it existed
    made = {key: start['config'][key] for key in ('r_init', 'sigma_init', 'tau', 'tau_sample')}
    config.update(made)                                       # what the generator was made for
    r_init, sigma_init, tau, tau_sample = made.values()
    tokenizer = Tokenizer.from_checkpoint(start['tokenizer'], tokenizer_path).to(device)
    words, T = packed['words'], start['args']['T']

    # Networks: teacher (phi), generator (theta) and its average, auxiliary (psi), discriminator
    teacher, generator, generator_ema, aux = (MDM(**start['args']).to(device) for _ in range(4))
    restore(teacher, packed['ema'], teacher_path, 'ema')
    for network, weights in ((generator, 'ema'), (generator_ema, 'ema'), (aux, 'aux')):
        restore(network, start[weights], init, weights)
    teacher.eval().requires_grad_(False)
    generator_ema.eval().requires_grad_(False)
    teacher.checkpointing = grad_checkpoint                                  # the heads' gradient passes through it
    for network in (generator, aux):
        network.checkpointing = grad_checkpoint
        for table in network.embedding_parameters() if freeze_tables else []:
            table.requires_grad_(False)
    some_prompts = lambda n: start['prompts'][torch.arange(n) % len(start['prompts'])].long().to(device)
    if bias:
        cond = some_prompts(32)
        first_block = lambda e: teacher.features(teacher.input_proj(e.reshape(len(e), teacher.L, -1)), cond, [1])[0]
        made_by = {'teacher, untrained as generator': packed, f'{start["stage"]}.pt': start}
        if os.path.exists(out):
            made_by['gan.pt'] = load_checkpoint(out, 'gan', fallback=True)
        print(f'soft embeddings of 32 captions, mean over images and 32 draws each\n{"generator":34s}{"f":18s}entropy  '
              'tr Cov(e)  |f(E e) - E f(e)|   bound  relative to |f(E e)|')
        for name, state in made_by.items():
            network = MDM(**start['args']).to(device).eval().requires_grad_(False)
            restore(network, state['ema'], name, 'ema')
            rngs = image_rngs(seed, range(32), device)
            z = one_step(network, cond, r_init, sigma_init, tau, rngs)[0].float() / tau_soft
            probs = z.softmax(-1)
            for what, f, table in (('decoder', tokenizer.decode_latents, tokenizer.table),
                                   ('first block', first_block, teacher.table[:teacher.V])):
                rng = rng_for(seed, 0, 'bias', device)
                gap, bound, trace = (x.mean() for x in relaxation_bias(f, probs, table, rng))
                size = f(probs @ table).flatten(1).norm(dim=1).mean()
                print(f'{name:34s}{what:18s}{token_entropy(z)[0]:7.3f}{trace:11.3f}{gap:19.3f}{bound:8.3f}'
                      f'{gap / size:23.4f}')
        raise SystemExit
    layers = head_layers(len(teacher.blocks))
    torch.manual_seed(seed)
    disc = Discriminator(teacher.D, teacher.L, layers, T * teacher.D, disc_width, spectral).to(device)
    trained = [[p for p in network.parameters() if p.requires_grad] for network in (generator, aux, disc)]
    optimizers = [make_optimizers(generator, generator_muon, generator_lr, (beta1, beta2), weight_decay),
                  make_optimizers(aux, aux_muon, aux_lr, (beta1, beta2), momentum=aux_momentum),
                  make_optimizers(disc, disc_muon, disc_lr, (0.9, 0.99))]
    step, smooth = 0, {}
    if resume:
        state = load_resumed(out, 'gan', config)
        same_tokens(packed, state, teacher_path, out)
        for name, network in (('net', generator), ('ema', generator_ema), ('aux', aux), ('disc', disc)):
            restore(network, state[name], out, name)
        restore_optimizers(sum(optimizers, []), state['optimizers'], out)
        set_rate(optimizers[2], 1)                                           # the others' follow in every update
        step, smooth = state['step'], {k: v.to(device) for k, v in state['smooth'].items()}
    same_weights(generator, generator_ema, aux, disc)
    if compile:
        compile_blocks(teacher, generator, aux)

    # The printed plan
    log = Log(out, step) if rank == 0 and not bench else None
    if untrained:
        dataset = torch.randint(min(teacher.V, len(words)), (64, teacher.N + T), generator=rng_for(seed, 0)).numpy()
    else:
        source = Images(data, tokenizer.config['image_size'], packed['config'].get('n_images', 0), words)
        flips |= packed['config'].get('flips', False)                         # as our teacher was trained
        dataset = token_data(source, tokenizer, out_dir, device, flips=flips)  # (M, N + T): real tokens, captions
        reference = Reference(source, n_reference)
        shown, _ = reference.prompts(32)
    teacher_steps = min(teacher_steps, teacher.N)
    if rank == 0:
        print(f'generator {sum(p.numel() for p in generator.parameters()) / 1e6:.2f} M parameters, heads on blocks '
              f'{layers} {sum(p.numel() for p in disc.parameters()) / 1e6:.2f} M, {len(dataset)} real images, {steps} '
              f'updates of {batch_size} = {world} x {accumulate} x {micro}')

    finish = lambda k: apply_gradients(trained[k], optimizers[k], accumulate * world, clip)  # -> gradient norm

    def draw_batch(rng):
        """Real tokens (B, N), their captions (B, T), and what the generator makes of these: logits, tokens."""
        index = torch.randint(len(dataset), (micro,), generator=rng, device=device).sort().values
        rows = torch.from_numpy(dataset[index.cpu().numpy()]).long().to(device)
        real, cond = rows.split([generator.N, T], 1)
        with autocast:
            return real, cond, *one_step(generator, cond, r_init, sigma_init, tau, rng)

    def discriminate(real, cond, logits, rng):
        """Real hard and fake soft embeddings, masked alike, in one pass of the frozen teacher; the discriminator's
        loss on them. -> teacher's states of both halves, its view of the condition, r, numbers for the log"""
        r = r_max * random_numbers((micro, 1), rng, device)                   # (B, 1), r ~ U[0, r_max]
        hidden = random_positions(real.shape, (r * generator.N).round(), rng, device)  # (B, N)
        with autocast:
            fake_emb = teacher.embed(relaxed(logits, relax, tau_soft, rng), hidden)      # Soft-Di[M]O Eq. 3
            emb = torch.cat([teacher.embed(real, hidden), fake_emb])                     # (2 B, L, D)
            states = teacher.features(emb, both(cond, cond), layers)
            c = teacher.cond_emb(cond).flatten(1)                             # (B, T D)
        d_real, d_fake = disc.train()([h.detach() for h in states], torch.cat([c, c]), torch.cat([r, r])).chunk(2)
        loss = disc_loss(d_real, d_fake, hinge)
        loss.backward()
        return states, c, r, dict(
            d_loss=loss.detach(), d_real=d_real.detach().mean(), d_fake=d_fake.detach().mean(),
            acc_real=(d_real > 0).float().mean(), acc_fake=(d_fake < 0).float().mean())

    def update():
        """One step of generator, auxiliary model and discriminator -> the numbers for the log, logits."""
        falling = max(0.05, (1 - step / steps) / cooldown) if cooldown else 1
        set_rate(optimizers[0] + optimizers[1], min(1, (step + 1) / max(1, warmup), falling))
        for network in (generator, aux, disc):
            network.zero_grad()
        numbers = {}
        for k in range(accumulate):
            rng = rng_for(seed, step, rank * accumulate + k, device)
            real, cond, logits, tokens = draw_batch(rng)
            grad = torch.zeros_like(logits, dtype=torch.float32)              # of the whole loss at the logits, times B
            # Di[M]O: the regulariser, and the auxiliary model's own loss
            if w_dimo:
                x_t, mask = remask(tokens, generator.mask_id, schedule, rng, p_full, p_near)
                with torch.no_grad(), autocast:
                    teacher_logits = guided_logits(teacher, x_t, cond, cfg_scale)
                with autocast:
                    aux_logits = aux(x_t, cond)
                psi_loss = aux_loss(aux_logits, tokens, mask, label_smoothing)
                psi_loss.backward()
                grad += w_dimo * dimo_grad(teacher_logits, aux_logits.detach(), mask, beta)
                numbers.update(aux_loss=psi_loss.detach(), grad_dimo=grad.norm() / micro)
            # GAN: the same features serve both players, the heads frozen for the generator's part
            if w_gan:
                states, c, r, health = discriminate(real, cond, logits, rng)
                disc.eval().requires_grad_(False)
                g_loss = gan_loss(disc([h[micro:] for h in states], c, r), hinge)
                gan_grad = w_gan * torch.autograd.grad(g_loss, logits)[0].float() * micro
                disc.requires_grad_(True)
                grad += gan_grad
                numbers.update(health, g_loss=g_loss.detach(), grad_gan=gan_grad.norm() / micro)
            surrogate(logits, grad).backward()
        numbers.update(norm_generator=finish(0), norm_aux=finish(1) if w_dimo else torch.zeros(()),
                       norm_disc=finish(2) if w_gan else torch.zeros(()))
        ema_update(generator_ema, generator, ema_decay, step)
        if w_dimo and (step + 1) % log_every == 0:
            numbers['divergence'] = jeffreys(teacher_logits, aux_logits.detach(), mask, beta).sum() / mask.sum()
        return numbers, logits.detach()

    if bench:
        report_bench(update, batch_size, device, autocast)
        raise SystemExit
    one_pass = lambda network: lambda cond, rng: one_step(network, cond, r_init, sigma_init, tau_sample, rng)[1]
    many_steps = lambda cond, rng: sample_teacher(teacher, cond, teacher_steps, teacher_cfg, teacher_gumbel, rng=rng)
    conditions = lambda captions: word_ids(captions, words, T).to(device)
    gap_cond = some_prompts(250)

    @torch.no_grad()
    def relaxation_gap():
        """Toy FD between decoded softmax(z / tau_soft), whatever `relax` is, and hard samples of the same z."""
        rngs = image_rngs(seed, range(250), device)
        logits, tokens = one_step(generator_ema, gap_cond, r_init, sigma_init, tau, rngs)
        soft, hard = (torch.cat([toy_features(tokenizer.decode(part)) for part in x.split(tokenizer.batch)])
                      for x in (relaxed(logits, 'soft', tau_soft), tokens))
        return frechet_distance(soft, hard)

    teacher_grid = render(many_steps, tokenizer, conditions(shown[:16]), seed)[0] if rank == 0 else None
    # The discriminator alone learns the game first
    alone, stop = disc_warmup if step == 0 and w_gan else 0, Stop()
    bar = progress(alone, 'discriminator')
    for k in range(alone):
        if stop.now(k, device):
            break
        disc.zero_grad()
        for part in range(accumulate):
            rng = rng_for(seed, -1 - k, rank * accumulate + part, device)
            with torch.no_grad():
                real, cond, logits, _ = draw_batch(rng)
            discriminate(real, cond, logits, rng)
        finish(2)
        bar.update()
    bar.close()
    bar, warned, first = progress(steps, 'gan', step), set(), None
    while True:
        # Save, show, measure, stop
        ending = step >= steps or stop.now(step, device)
        if rank == 0 and (step % save_every == 0 or ending):
            if step:
                save_checkpoint(out, dict(
                    stage='gan', step=step, config=config, args=generator.config, words=words, data=data,
                    prompts=start['prompts'], tokenizer=tokenizer.pack(), net=generator.state_dict(),
                    ema=generator_ema.state_dict(), aux=aux.state_dict(), disc=disc.state_dict(), smooth=smooth,
                    optimizers=[o.state_dict() for o in sum(optimizers, [])]))
            grid, _ = render(one_pass(generator_ema), tokenizer, conditions(shown[:16]), seed)
            save_grid(f'{out_dir}/gan-{step:06d}.png', torch.cat([teacher_grid, grid]), shown[:16] * 2)
            captions, _ = reference.prompts(min(1000, n_eval))
            row = reference.measure(render(one_pass(generator_ema), tokenizer, conditions(captions), seed)[0], captions)
            bar.write(f'step {step}: toy FD {row["toy_fd"]:.2f}, prompt followed {row["accuracy"]:.3f} '
                      f'({row["n"]} images), grid in {out_dir}/gan-{step:06d}.png')
        if ending:
            break
        # -------------------------------------------------------------------------
        numbers, logits = update()
        for key in (k for k in numbers if k != 'divergence' and not k.startswith('norm_')):  # in order: equal files
            smooth[key] = torch.lerp(smooth[key], numbers[key], 0.05) if key in smooth else numbers[key]
        step += 1
        bar.update()
        if rank == 0 and (step % log_every == 0 or step % save_every == 0 or step == steps):
            check_finite(step, **{f'{name}_lr': numbers[f'norm_{name}'] for name in ('generator', 'aux', 'disc')})
        if step % log_every == 0 and rank == 0:
            entropy, top = token_entropy(logits)
            if w_dimo and w_gan:
                numbers['ratio'] = smooth['grad_gan'] / smooth['grad_dimo']
            row = {k: round(float(v), 5) for k, v in {**numbers, **smooth, 'entropy': entropy, 'max_prob': top,
                                                      'gap': relaxation_gap()}.items()}
            log.write(dict(step=step, **row))
            bar.set_postfix({k: row[k] for k in ('divergence', 'acc_real', 'acc_fake', 'entropy') if k in row},
                            refresh=False)
            first = first or row
            for text in advice(row, first) - warned:
                bar.write(f'step {step}: {text}')
                warned.add(text)
    bar.close()

    # The table
    if rank == 0 and step >= steps:
        before = MDM(**start['args']).to(device).eval()
        restore(before, start['ema'], init, 'ema')
        passes = teacher_passes(teacher, teacher_steps, teacher_cfg)
        samplers = {f'teacher, {teacher_steps} steps': (passes, many_steps),
                    f'{start["stage"]}{" before" * (start["stage"] == "gan")}, 1 step': (1, one_pass(before)),
                    'gan, 1 step': (1, one_pass(generator_ema))}
        final_table(out[:-3], samplers, tokenizer, reference, conditions, n_eval, seed, config)
    end_processes()
