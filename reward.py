"""
Stage 2b, rewards (Soft-Di[M]O, arXiv 2509.22925): follow the prompt better, by gradients through the decoded image.

    loss = - sum_i w_i R_i(decode(softmax(z)), prompt) + w_dimo Di[M]O surrogate

Left out: the GAN term (start from its result instead, --init=out/gan.pt: both terms in one loop would double this file)
and activation checkpointing. Added: a held-out reward that is never optimised and ends the run when it turns. The
settings of the Di[M]O term (r_init, beta, tau, ...) are read from the checkpoint that the run starts from.

$ python reward.py                              # from out/distill.pt; trains its two small reward models if missing
$ python reward.py --w_dimo=0 --patience=0 --init=out/distill.pt --teacher_ckpt=out/model.pt --out_dir=out/hack
                                                # what happens without the Di[M]O term
$ python reward.py --relax=st --init=out/gan.pt # straight-through instead of soft, from another generator
$ python reward.py --w_clip=0 --w_hps=5 --hps_path=HPS_v2.1_compressed.pt   # a published reward (needs transformers)
$ torchrun --nproc_per_node=8 reward.py --batch_size=1024 --generator_lr=1e-5 --aux_lr=1e-5
Expected (2 CPU cores, shapes world): see "Rewards" in README.md.
"""
import math
import os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from model import (MDM, Images, Log, Reference, Stop, Tokenizer, TwoTower, add_noise, apply_gradients, aux_loss,
                   categorical, check_finite, compile_blocks, configure, dimo_grad, ema_update, end_processes,
                   final_table, guided_logits, init_tokens, jeffreys, load_checkpoint, load_resumed, load_rewards,
                   make_optimizers, one_step, progress, relaxed, remask, render, report_bench, restore,
                   restore_optimizers, reward_sum, rng_for, same_tokens, same_weights, sample_teacher, save_checkpoint,
                   save_grid, set_rate, split_batch, start_processes, surrogate, teacher_passes, token_entropy,
                   word_ids, world_reward)
from tokenizer import wrong_caption

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'        # model.pt, distill.pt and rewards.pt are found here; reward.pt, log and pictures go here
init = ''              # generator to start from, '' = out_dir/distill.pt; gan.pt and reward.pt do as well
teacher_ckpt = ''      # another teacher than out_dir/model.pt
resume = False         # continue from out_dir/reward.pt to the same bits
seed = 0               # every random number of the run follows from it
log_every = 25         # steps between log lines
save_every = 100       # steps between checkpoints, sample grids and measurements of 500 images
n_eval = 2000          # images behind each row of the final table
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
w_dimo = 1.0           # weight of the Di[M]O surrogate, the guard against reward hacking; 0 = off
ramp = 0.1             # share of the steps over which the reward weights rise from 0
patience = 3           # stop after so many measurements without a better held-out reward, keeping the best; 0 = never
# the small reward models
reward_steps = 500     # updates of each
reward_batch = 128     # images per update, half of them decoded from mixed tokens
reward_lr = 2e-3       # AdamW, 50 steps of warm-up, falls to zero along a cosine
n_wrong = 6            # wrong captions per image: one fact changed
# training
steps = 400            # generator updates
batch_size = 32        # images per update, all processes together; paper 64
micro_batch = 0        # images per forward pass on one device, 0 = as many as fit one pass; lower it to save memory
generator_lr = 1e-4    # Adam; paper 1e-5 on everything
aux_lr = 5e-4          # Adam; the auxiliary model must follow the generator; paper 1e-5 on everything
generator_muon = 0.002  # Muon on the matrices of the trunk; 0 = Adam on everything, as in the paper
aux_muon = 0.01        # the same for the auxiliary model
aux_momentum = 0.8     # its Muon's, as in distill.py
beta1 = 0.9            # Adam
beta2 = 0.99           # Adam; paper .999
warmup = 25            # steps of linear warm-up; paper 100
cooldown = 0.8         # last share of the steps over which the rates fall to 5 %; paper 0
clip = 1.0             # largest gradient norm, each network, 0 = none; paper 1
image_clip = 3.0       # largest gradient norm of one image at the generator's input, 0 = none; paper 0
ema_decay = 0.98       # averaged generator, which is what gets sampled; paper .9999
# the teacher in the final table
teacher_steps = 16     # steps of the confidence sampler
teacher_cfg = 1.5      # guidance at the last step, rising from 1
teacher_gumbel = 8.0   # Gumbel temperature of the confidence, falling to 0
# system
compile = False        # torch.compile the blocks of the three networks
bench = False          # time 20 steps and stop
# -----------------------------------------------------------------------------
# Training the rewards of the small world (the interface and the networks are in model.py)

def mixed(ids, other, V, rng):
    """Token probabilities (B, N, V) between two sets of images, ids (B, N): inside a random box, at random positions,
    each pair with a weight of its own. What a one-step generator gets wrong looks like this."""
    B, N = ids.shape
    side = math.isqrt(N)
    u, at = torch.rand(B, 6, 1, generator=rng), torch.arange(side)
    def between(size, start):
        size = 1 + (size * side).long().clamp(max=side - 1)
        start = (start * (side - size + 1)).long()
        return (at >= start) & (at < start + size)                           # (B, side)
    box = (between(u[:, 0], u[:, 1])[:, :, None] & between(u[:, 2], u[:, 3])[:, None]).flatten(1)
    box = box & (torch.rand(B, N, generator=rng) < 0.2 + 0.8 * u[:, 4])
    weight = (1.3 * u[:, 5]).clamp(max=1) * box                              # (B, N)
    one_hot = lambda x: F.one_hot(x, V).float()
    return torch.lerp(one_hot(ids), one_hot(other), weight[..., None].to(ids.device))


RIGHT, BROKEN = 0.15, 0.3  # reconstructions: 90 % below .14; the checker accepts 99 % up to .15, a quarter above .3


def damage(x, y):
    """How far images x are from y where they differ most: mean |x - y| over 4 x 4 pixels, the largest, (B,)."""
    return F.avg_pool2d((x - y).abs().mean(1, keepdim=True), 4, 2).flatten(1).max(1).values


def train_reward(kind, source, tokenizer, words, T, part, device):
    """One two-tower model, contrastive (CLIP) and with log-odds that mean something (SigLIP, arXiv 2303.15343): an
    image against its own caption, `n_wrong` with one fact changed and the batch's. Half of the images are decoded from
    tokens mixed with those of another image of the same caption (two modes at once), of a wrong one, or of any; they
    count as right, as wrong or not at all by the pixel damage that did (at most RIGHT, above BROKEN)."""
    if len(words) < 2:
        raise SystemExit(f'reward.py: {source.data} has a single class, so there is nothing to follow')
    torch.manual_seed(seed + part)
    net = TwoTower(kind, len(words), T).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=reward_lr, betas=(0.9, 0.98), weight_decay=0.01)
    n = min(10_000, source.length, 2 ** 27 // source.size ** 2)              # of a folder: spread over its classes
    images, captions = source.batch(range(n) if source.is_world else torch.linspace(0, source.length - 1, n).long())
    with torch.no_grad():
        tokens = torch.cat([tokenizer.encode(x.to(device)) for x in images.split(tokenizer.batch)])
    def wrong(caption, u):
        others = [w for w in words if w != caption]
        return wrong_caption(caption, u) if source.is_world else others[int(u * len(others))]
    ids, where = word_ids(captions, words, T), {}
    for i, caption in enumerate(captions):
        where.setdefault(caption, []).append(i)
    bar = progress(reward_steps, f'reward model {kind}')
    for step in range(reward_steps):
        falling = 0.5 + 0.5 * math.cos(math.pi * step / reward_steps)
        optimizer.param_groups[0]['lr'] = reward_lr * min(1, (step + 1) / 50) * falling
        rng, half = rng_for(seed, step, ('rewards', part)), reward_batch // 2
        k = torch.randint(len(images), (reward_batch,), generator=rng)
        x, cond, u = images[k].to(device), ids[k].to(device), torch.rand(reward_batch, n_wrong + 1, generator=rng)
        false = [wrong(captions[i], float(v)) for i, row in zip(k.tolist(), u[:, 1:]) for v in row]
        near = []
        for i, j, v, c in zip(k.tolist(), k.roll(1).tolist(), u[:, 0], false[::n_wrong]):
            choice = where[captions[i]] if v < 0.5 else where.get(c, [j])    # the same caption, a wrong one, or any
            near.append(choice[int(2 * (v % 0.5) * len(choice))])
        with torch.no_grad():
            pair = (tokens[j[half:]] for j in (k, torch.tensor(near)))
            x[half:] = tokenizer.decode(mixed(*pair, tokenizer.V, rng)).clamp(-1, 1)
            alike = torch.tensor([captions[i] == captions[j] for i, j in zip(k.tolist(), near)])
            harm = [damage(x, images[j].to(device)) for j in (k, torch.where(alike, torch.tensor(near), k))]
            harm = torch.minimum(*harm)                                      # (B,), 0 for the renders
        noise = 0.1 * torch.rand(len(x), 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
        f, g = net.image_features(x + noise.to(device)), net.text_features(cond)
        g_false = net.text_features(word_ids(false, words, T).to(device)).view(len(k), n_wrong, -1)
        same = (cond[:, None] == cond).all(-1)                               # (B, B), the diagonal too
        s_true, s_false = net.score(f, g), net.score(f[:, None], g_false)    # (B,), (B, n_wrong)
        s_other = net.score(f[:, None], g).masked_fill(same, -1e9)           # (B, B)
        right, broken = (harm <= RIGHT).float(), (harm > BROKEN).float()
        contrast = torch.cat([s_true[:, None], s_false, s_other], 1).logsumexp(1) - s_true
        loss = ((contrast + F.softplus(-s_true)) * right + 2 * F.softplus(s_true) * broken).mean() \
            + F.softplus(s_false).mean() + 0.5 * F.softplus(s_other.roll(1, 1).diagonal()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        bar.update()
    bar.close()
    return net.requires_grad_(False)


class Judged(Reference):
    """The metrics of model.py, with both rewards and two symptoms of reward hacking beside them."""

    def __init__(self, source, rewards, held_out, device):
        super().__init__(source, n_reference)
        self.rewards, self.held_out, self.device = rewards, held_out, device

    @torch.no_grad()
    def judge(self, images, captions):
        """Images (B, 3, H, W), captions -> means: trained reward, held-out reward, share of clipped values, colour
        saturation (largest minus smallest channel, in [0, 1])."""
        x = images.clamp(-1, 1)
        return dict(reward=reward_sum(self.rewards, images, captions).mean(),
                    held_out=self.held_out(images, captions).mean(), clipped=(images.abs() > 1).float().mean(),
                    saturation=(x.amax(1) - x.amin(1)).mean() / 2)

    def measure(self, images, captions):
        parts = images.split(250)
        rows = [self.judge(x.to(self.device), captions[250 * k:250 * k + 250]) for k, x in enumerate(parts)]
        means = {key: float(sum(len(x) * r[key] for x, r in zip(parts, rows)) / len(images)) for key in rows[0]}
        return dict(super().measure(images, captions), **means)


def has_turned(held, patience):
    """Early stopping: `patience` measurements of the held-out reward since its best; 0 = never."""
    return bool(held and patience) and len(held) - 1 - held.index(max(held)) >= patience


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals())
    rank, world, device, autocast = start_processes()
    micro, accumulate = split_batch(batch_size, micro_batch, world)
    out, world_file = os.path.join(out_dir, 'reward.pt'), os.path.join(out_dir, 'rewards.pt')
    teacher_path, init_path = teacher_ckpt or f'{out_dir}/model.pt', init or f'{out_dir}/distill.pt'
    packed = load_checkpoint(teacher_path, 'model', 'Train it with: python model.py', fallback=True)
    start = load_checkpoint(init_path, 'distill|gan|reward', 'Make one with: python distill.py', fallback=True)
    if os.path.abspath(init_path) == os.path.abspath(out):
        raise SystemExit(f'reward.py: --init={init_path} would be overwritten; choose another --out_dir')
    if not start['data']:
        raise SystemExit(f'{init_path}: was made without data; reward.py is for the shapes world and image folders')
    same_tokens(packed, start, teacher_path, init_path)
    tokenizer = Tokenizer.from_checkpoint(start['tokenizer']).to(device)
    words, prompts = start['words'], start['prompts'].long()                  # prompts (M, T), the training captions
    start['config'].setdefault('tau_sample', 1.0)                             # files made before it existed
    r_init, sigma_init, tau, tau_sample, beta, cfg_scale, schedule, p_full, p_near, label_smoothing, freeze_tables = (
        start['config'][key] for key in ('r_init', 'sigma_init', 'tau', 'tau_sample', 'beta', 'cfg_scale', 'schedule',
                                         'p_full', 'p_near', 'label_smoothing', 'freeze_tables'))
    config = {**start['config'], **config}                                    # sample.py reads r_init, ... there
    source = Images(start['data'], tokenizer.config['image_size'], expected=words)

    # Rewards: the optimised ones and the held-out one
    if rank == 0 and not os.path.exists(world_file):
        print(f'{world_file} is missing: training two small reward models, expected 2 minutes on 2 CPU cores')
        try:
            nets = {name: train_reward(kind, source, tokenizer, words, prompts.shape[1], part, device)
                    for part, (name, kind) in enumerate((('clip', 'conv'), ('held_out', 'patch')))}
        except KeyboardInterrupt:
            raise SystemExit('reward.py: stopped; the same command trains the reward models anew') from None
        save_checkpoint(world_file, dict(stage='rewards', step=reward_steps, config=config, words=words,
                                         data=start['data'], args={name: net.config for name, net in nets.items()},
                                         **{name: net.state_dict() for name, net in nets.items()}))
    if world > 1:
        dist.barrier()
    made = load_checkpoint(world_file, 'rewards', fallback=True)
    if (made.get('data'), made['step'], made['words']) != (start['data'], reward_steps, words):
        raise SystemExit(f'{world_file}: made in {made["step"]} steps for {made.get("data")} ({len(made["words"])} '
                         f'words), expected {reward_steps} for {start["data"]} ({len(words)}); delete it, or choose '
                         'another --out_dir')
    rewards = load_rewards(config, world_file, device)
    if not rewards:
        raise SystemExit('reward.py: every reward has weight 0; give one, as in --w_clip=10')
    reference = Judged(source, rewards, world_reward(world_file, 'held_out', device), device)

    # Networks: teacher (phi), generator (theta), its average and its start, auxiliary (psi)
    teacher = MDM(**packed['args']).to(device)
    generator, generator_ema, aux, start_net = (MDM(**start['args']).to(device) for _ in range(4))
    for network, weights, path in ((teacher, packed['ema'], teacher_path), (aux, start['aux'], init_path),
                                   *((n, start['ema'], init_path) for n in (generator, generator_ema, start_net))):
        restore(network, weights, path, 'weights')
    for network in (teacher, generator_ema, start_net):
        network.eval().requires_grad_(False)
    for network in (generator, aux):
        for table in network.embedding_parameters() if freeze_tables else []:
            table.requires_grad_(False)
    trained = [[p for p in network.parameters() if p.requires_grad] for network in (generator, aux)]
    optimizers = [make_optimizers(generator, generator_muon, generator_lr, (beta1, beta2)),
                  make_optimizers(aux, aux_muon, aux_lr, (beta1, beta2), momentum=aux_momentum)]
    step, stop, smooth, history, best = 0, Stop(), {}, [], {}
    if resume:
        state = load_resumed(out, 'reward', config)
        same_tokens(packed, state, teacher_path, out)
        for name, network in (('net', generator), ('average', generator_ema), ('aux', aux)):
            restore(network, state[name], out, name)
        restore_optimizers(optimizers[0] + optimizers[1], state['optimizers'], out)
        step, smooth = state['step'], {k: v.to(device) for k, v in state['smooth'].items()}
        history, best = state['history'], state['ema']
    same_weights(generator, generator_ema, aux)
    if compile:
        compile_blocks(teacher, generator, aux, twice=bool(image_clip))

    # The printed plan
    teacher_steps = min(teacher_steps, teacher.N)
    log = Log(out, step) if rank == 0 and not bench else None
    shown, _ = reference.prompts(32)
    if rank == 0:
        print(f'3 x {sum(p.numel() for p in generator.parameters()) / 1e6:.2f} M parameters, {steps} updates of '
              f'{batch_size} = {world} x {accumulate} x {micro}, rewards '
              + ' + '.join(f'{w:g} {name}' for name, (w, _) in rewards.items())
              + f' ({relax}), Di[M]O {w_dimo:g}, from {init_path}')

    def update():
        """One step: reward and Di[M]O gradients at the logits, auxiliary update -> the numbers for the log."""
        falling = max(0.05, (1 - step / steps) / cooldown) if cooldown else 1
        set_rate(optimizers[0] + optimizers[1], min(1, (step + 1) / max(1, warmup), falling))
        generator.zero_grad()
        aux.zero_grad()
        numbers = {}
        for k in range(accumulate):
            rng = rng_for(seed, step, rank * accumulate + k, device)
            cond = prompts[torch.randint(len(prompts), (micro,), generator=rng, device=device).cpu()]
            captions = [' '.join(words[i] for i in row if i < len(words)) for row in cond.tolist()]
            cond = cond.to(device)
            x_init = init_tokens(micro, generator.N, generator.V, r_init, rng, device)
            emb = add_noise(generator.embed(x_init), sigma_init, rng)
            emb = emb if emb.requires_grad else emb.requires_grad_()         # frozen tables
            with autocast:
                logits = generator(emb, cond)                                # `one_step`, with emb at hand
            tokens = categorical((logits.detach().float() / tau).softmax(-1), rng)
            # Rewards: - sum_i w_i R_i(decode(softmax(z / tau))), differentiated down to z only
            z = logits.detach().float().requires_grad_()
            images = tokenizer.decode(relaxed(z, relax, tau, rng))           # (B, 3, H, W), float32
            total = -reward_sum(rewards, images, captions).sum() * min(1, (step + 1) / max(1, ramp * steps))
            total.backward()
            reward_grad = z.grad                                             # per image, as `grad`
            grad = torch.zeros_like(reward_grad)
            if w_dimo:  # Di[M]O at x_t, as in distill.py, and the auxiliary model with its own loss
                x_t, mask = remask(tokens, generator.mask_id, schedule, rng, p_full, p_near)
                with torch.no_grad(), autocast:
                    teacher_logits = guided_logits(teacher, x_t, cond, cfg_scale)
                with autocast:
                    aux_logits = aux(x_t, cond)
                grad = w_dimo * dimo_grad(teacher_logits, aux_logits.detach(), mask, beta)
                psi_loss = aux_loss(aux_logits, tokens, mask, label_smoothing)
                psi_loss.backward()
                numbers['aux_loss'] = psi_loss.detach()
            # An image between two modes has a gradient hundreds of times larger than the median; no image may dominate
            total_grad = grad + reward_grad
            if image_clip:
                (surrogate(logits, total_grad) * micro).backward(inputs=[emb], retain_graph=True)
                size = emb.grad.flatten(1).norm(dim=1)                       # (B,)
                total_grad = total_grad * (image_clip / size.clamp(min=image_clip))[:, None, None]
                numbers['clipped_images'] = (size > image_clip).float().mean()
            surrogate(logits, total_grad).backward()
        numbers.update(norm_generator=finish(0), norm_aux=finish(1) if w_dimo else torch.zeros(()))
        ema_update(generator_ema, generator, ema_decay, step)
        numbers.update(grad_dimo=grad.norm() / micro, grad_reward=reward_grad.norm() / micro)  # before image_clip
        if w_dimo and (step + 1) % log_every == 0:
            numbers['divergence'] = jeffreys(teacher_logits, aux_logits.detach(), mask, beta).sum() / mask.sum()
        return numbers, (logits.detach(), images.detach(), captions)

    finish = lambda k: apply_gradients(trained[k], optimizers[k], accumulate * world, clip)  # -> gradient norm

    if bench:
        report_bench(update, batch_size, device, autocast)
        raise SystemExit
    from_net = lambda network: lambda cond, rng: one_step(network, cond, r_init, sigma_init, tau_sample, rng)[1]
    conditions = lambda captions: word_ids(captions, words, prompts.shape[1])
    start_grid = render(from_net(start_net), tokenizer, conditions(shown[:16]), seed)[0] if rank == 0 else None
    bar, turned = progress(steps, 'reward', step), False
    while True:
        # Measure, keep the best by held-out reward, save, show, stop
        ending = step >= steps or stop.now(step, device)
        if rank == 0 and (step % save_every == 0 or ending):
            if (step % save_every == 0 or step >= steps) and step not in [h['step'] for h in history]:
                captions, _ = reference.prompts(min(500, n_eval))
                drawn, _ = render(from_net(generator_ema), tokenizer, conditions(captions), seed)
                row = reference.measure(drawn, captions)
                row = dict(step=step, **{k: row[k] for k in ('reward', 'held_out', 'accuracy', 'toy_fd')})
                if not history or row['held_out'] > max(h['held_out'] for h in history) or not patience:
                    best = {k: v.clone() for k, v in generator_ema.state_dict().items()}
                history.append(row)
                bar.write('step {step}: reward {reward:.3f}, held-out {held_out:.3f}, prompt followed {accuracy:.3f}, '
                          'toy FD {toy_fd:.2f}'.format(**row))
            if step:
                save_checkpoint(out, dict(
                    stage='reward', step=step, config=config, args=generator.config, words=words, data=start['data'],
                    prompts=start['prompts'], tokenizer=start['tokenizer'], net=generator.state_dict(),
                    ema=best,  # the average at its best measurement; the running one is `average`
                    average=generator_ema.state_dict(), aux=aux.state_dict(), smooth=smooth, history=history,
                    optimizers=[o.state_dict() for o in optimizers[0] + optimizers[1]]))
            grid, _ = render(from_net(generator_ema), tokenizer, conditions(shown[:16]), seed)
            save_grid(f'{out_dir}/reward-{step:06d}.png', torch.cat([start_grid, grid]), shown[:16] * 2)
            turned = has_turned([h['held_out'] for h in history], patience)
        if world > 1 and step % save_every == 0:
            flag = torch.tensor(float(turned), device=device)
            dist.broadcast(flag, 0)
            turned = bool(flag)
        if ending or turned:
            break
        # -------------------------------------------------------------------------
        numbers, (logits, images, captions) = update()
        for key in ('aux_loss', 'grad_dimo', 'grad_reward'):
            if key in numbers:
                smooth[key] = torch.lerp(smooth[key], numbers[key], 0.05) if key in smooth else numbers[key]
        step += 1
        bar.update()
        if rank == 0 and (step % log_every == 0 or step % save_every == 0 or step == steps):
            check_finite(step, generator_lr=numbers['norm_generator'], aux_lr=numbers['norm_aux'])
        if step % log_every == 0 and rank == 0:
            entropy, top = token_entropy(logits)
            row = {**numbers, **smooth, **reference.judge(images, captions), 'entropy': entropy, 'max_prob': top,
                   'toy_fd': history[-1]['toy_fd']}
            row = dict(step=step, **{k: round(float(v), 5) for k, v in row.items()})
            bar.set_postfix({k: row[k] for k in ('reward', 'held_out', 'entropy')}, refresh=False)
            log.write(row)
    bar.close()

    # The table
    if rank == 0 and (step >= steps or turned):
        restore(generator_ema, best, out, 'ema')
        kept = max(history, key=lambda h: h['held_out'] if patience else h['step'])['step']
        print(f'kept: step {kept}' + f', where the held-out reward was highest; stopped at {step}' * bool(patience))
        many = lambda cond, rng: sample_teacher(teacher, cond, teacher_steps, teacher_cfg, teacher_gumbel, rng=rng)
        passes = teacher_passes(teacher, teacher_steps, teacher_cfg)
        final_table(out[:-3], {
            f'teacher, {teacher_steps} steps': (passes, many), f'start, {start["stage"]}': (1, from_net(start_net)),
            'rewarded, 1 step': (1, from_net(generator_ema))}, tokenizer, reference, conditions, n_eval, seed, config)
    end_processes()
