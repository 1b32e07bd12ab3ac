"""
Stage 3, test-time embedding optimisation (Soft-Di[M]O, arXiv 2509.22925): for one prompt, move the generator's *input
embedding* uphill on the reward; no weight changes. The template is ReNO (arXiv 2406.04312), which moves the noise.

    x_init -> e = embed(x_init) + noise -> z = G(e, c) -> image = decode(softmax(z / tau)) -> R(image, prompt)
              e <- e + lr dR/de, and the best image seen so far is kept, the one before the first step included

Left out: momentum, and ReNO's prior on the noise norm (an embedding has none; --pull is an L2 pull to the start).
Added: a limit on each image's gradient, and starting from the best of several (--starts). The control is best-of-N:
fresh x_init, the best by the same score, at equal passes (a backward counts as two). The score is the reward of the
image that is handed out, so what is kept is what was scored. The held-out reward and the checker are reported, never
looked at.

$ python tteo.py --ckpt out/reward.pt --prompt "a red circle left of a blue square"   # 16 images, before and after
$ python tteo.py --ckpt out/reward.pt                                       # captions of all six tasks: table and curve
$ python tteo.py --ckpt out/distill.pt --best_of 64                         # the control with another N
Expected (2 CPU cores, shapes world): a minute; numbers in "Rewards" of README.md.
"""
import json
import os
import time

import numpy as np
import torch
from PIL import Image, ImageDraw

from model import (MDM, Images, Tokenizer, add_noise, check, configure, image_rngs, init_tokens, load_checkpoint,
                   load_rewards, parse_caption, progress, relaxed, restore, reward_sum, rng_for, save_grid,
                   start_processes, word_ids, world_reward, writing)
from tokenizer import HELD_OUT, TASKS

# -----------------------------------------------------------------------------
# I/O
ckpt = 'out/reward.pt'  # any generator: distill.pt, gan.pt, reward.pt; rewards.pt is found beside it
prompt = ''            # one caption for all images; '' = n held-out captions of all tasks
n = 0                  # images, 0 = 16 of one prompt or 300 of all tasks
seed = 0               # image k follows from (seed, k)
batch = 100            # images per forward pass; lower it when memory runs out
name = ''              # pictures and tables are written as NAME.png, ...; '' = tteo beside the checkpoint
# optimisation
starts = 1             # fresh x_init, of which the best is optimised; paper 1, 4 is better here
iterations = 10        # gradient steps; ReNO 50
lr = 0.2               # SGD; paper .2
clip = 2.0             # largest gradient norm of one image, 0 = none; paper 0, ReNO .1 (with lr 5)
pull = 0.0             # weight of |e - e_start|^2 / 2 per image
relax = 'soft'         # soft, gumbel or st, as in reward.py
output = 'soft'        # the image handed out and scored: soft decode, free here; tokens: argmax, a pass more per step
best_of = 0            # draws of the control, 0 = as many as cost the same passes
# rewards, as in reward.py
w_clip = 1.0
w_clipscore = 0.0
w_hps = 0.0
w_pick = 0.0
w_imagereward = 0.0
clip_path = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
hps_path = 'HPS_v2.1_compressed.pt'
pick_path = 'yuvalkirstain/PickScore_v1'
imagereward_path = 'ImageReward.pt'
bert_path = 'bert-base-uncased'
# -----------------------------------------------------------------------------

def passes_of(iterations, output, starts=1):
    """Network-plus-decoder passes of a run: one per fresh start, a forward for every iterate, a backward (two) for
    every step; where tokens are handed out, their decoding counts as one more for every step."""
    return (starts if starts > 1 else 0) + (3 + (output == 'tokens')) * iterations + 1


def keep_better(best, score, x):
    """(score (B,), images or embeddings) and a new pair -> row by row the better one, the earlier one if equal."""
    if best is None:
        return score, x
    better = score > best[0]
    return torch.where(better, score, best[0]), torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, best[1])


def ascend(emb, draw, score, iterations, lr, clip, pull):
    """SGD on the input embedding (B, L, D), each image by itself. draw(emb) -> (images to differentiate, images handed
    out); score(images) -> (B,). Yields per iterate (score, kept score, kept images, distance from the start)."""
    start, best = emb, None
    for k in range(iterations + 1):
        emb = emb.detach().requires_grad_(k < iterations)
        with torch.set_grad_enabled(k < iterations):
            images, handed_out = draw(emb)
            value = score(images)                                            # (B,)
        with torch.no_grad():
            shown = value.detach() if handed_out is images else score(handed_out)
            best = keep_better(best, shown, handed_out.detach())
        yield shown, *best, (emb.detach() - start).flatten(1).norm(dim=1)
        if k < iterations:
            grad, = torch.autograd.grad(value.sum() - pull / 2 * (emb - start).square().sum(), emb)
            norm = grad.flatten(1).norm(dim=1)[:, None, None]
            emb = emb + lr * grad * (clip / norm.clamp(min=clip) if clip else 1)


def save_curve(path, curves, label):
    """{name: [(x, y)]} -> a PNG with one line each."""
    W, H, colors = 560, 360, ('crimson', 'royalblue', 'seagreen', 'black')
    points = [p for line in curves.values() for p in line]
    (x0, x1), (y0, y1) = ((min(v), max(max(v), min(v) + 1e-6)) for v in zip(*points))
    at = lambda x, y: (60 + (x - x0) / (x1 - x0) * (W - 80), H - 50 - (y - y0) / (y1 - y0) * (H - 80))
    sheet = Image.new('RGB', (W, H), 'white')
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((60, 30, W - 20, H - 50), outline='gray')
    for k in range(5):
        x, y = x0 + k / 4 * (x1 - x0), y0 + k / 4 * (y1 - y0)
        pen.text((at(x, y0)[0] - 8, H - 44), f'{x:.0f}', fill='black')
        pen.text((16, at(x0, y)[1] - 6), f'{y:.3f}', fill='black')
    pen.text((W // 2 - 120, H - 24), 'network-plus-decoder passes per image', fill='black')
    pen.text((62, 12), label, fill='black')
    for k, (line, color) in enumerate(zip(curves, colors)):
        pen.line([at(*p) for p in curves[line]], fill=color, width=2)
        pen.text((W - 200, H - 110 + 14 * k), line, fill=color)
    with writing(path):
        sheet.save(path)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals())
    _, world, device, _ = start_processes(half=())
    if world > 1:
        raise SystemExit('tteo.py: runs as one process; start it with python, not torchrun')
    state = load_checkpoint(ckpt, 'distill|gan|reward', 'Make one with: python reward.py', fallback=True)
    generator = MDM(**state['args']).to(device).eval().requires_grad_(False)
    restore(generator, state['ema'], ckpt, 'ema')
    tokenizer = Tokenizer.from_checkpoint(state['tokenizer']).to(device)
    words, made = state['words'], state['config']
    if not state['data']:
        raise SystemExit(f'{ckpt}: was made without data, so there are no small reward models to choose images by')
    source = Images(state['data'], tokenizer.config['image_size'], expected=words)
    folder = os.path.dirname(ckpt)
    world_file, name = os.path.join(folder, 'rewards.pt'), name or os.path.join(folder, 'tteo')
    made_for = load_checkpoint(world_file, 'rewards', 'Make it with: python reward.py', fallback=True)['words']
    if made_for != words:
        raise SystemExit(f'{world_file}: made for other words than {ckpt}; give a generator its own folder')
    rewards = load_rewards(config, world_file, device)
    if not rewards:
        raise SystemExit('tteo.py: every reward has weight 0; give one, as in --w_clip=1')
    held_out = world_reward(world_file, 'held_out', device)
    n = n or (16 if prompt else 300)
    captions = [prompt] * n if prompt else source.batch(HELD_OUT + 10 ** 6 + np.arange(n) if source.is_world
                                                        else np.linspace(0, source.length - 1, n).astype(int))[1]
    try:
        conditions = word_ids(captions, words, state['args']['T']).to(device)
        tasks = np.array([parse_caption(c)[0] for c in captions] if source.is_world else [''] * n)
    except ValueError as error:
        raise SystemExit(f'tteo.py: {error}') from None

    def start_embedding(cond, rngs):
        """What sample.py feeds the generator: embedded x_init plus noise, (B, L, D)."""
        x_init = init_tokens(len(cond), generator.N, generator.V, made['r_init'], rngs, device)
        return add_noise(generator.embed(x_init), made['sigma_init'], rngs)

    def drawing(cond, rngs):
        """emb -> (images to differentiate, images handed out)."""
        def draw(emb):
            logits = generator(emb, cond)
            soft = lambda: tokenizer.decode(relaxed(logits, relax, made['tau'], rngs))
            if output == 'soft':
                return (soft(),) * 2
            hard = tokenizer.decode(logits.argmax(-1))                       # from ids: no graph
            return soft() if emb.requires_grad else hard, hard
        return draw

    def report(images, part):
        """The judges that choose nothing: held-out reward and checker, (B,) each."""
        right = check(images, captions[part]) if source.is_world else np.full(len(images), np.nan)
        return held_out(images, captions[part]), torch.from_numpy(right).to(device)

    def run(label, iterates, passes):
        """Collect a batch-wise generator of iterates -> (iterates, 5, n): kept score, held-out, followed, current
        score, distance; first and last images; milliseconds per image without the reporting."""
        rows, first, last, spent, bar = [[] for _ in passes], [], [], 0.0, progress(n * len(passes), label)
        for part in (slice(k, k + batch) for k in range(0, n, batch)):
            clock = time.time()
            for k, (shown, best, images, moved) in enumerate(iterates(part)):
                if device.type == 'cuda':
                    torch.cuda.synchronize()
                spent += time.time() - clock
                if k == 0:
                    first.append(images.cpu())
                rows[k].append(torch.stack([best, *report(images, part), shown, moved]).double().cpu())
                bar.update(len(images))
                clock = time.time()
            last.append(images.cpu())
        bar.close()
        rows = torch.stack([torch.cat(r, 1) for r in rows])                  # (iterates, 5, n)
        return rows, torch.cat(first), torch.cat(last), spent * 1000 / n

    def fresh_start(j, part):
        """Start j of these images -> (embedding, its `drawing`); 0 is sample.py's."""
        index = range(part.start, min(part.stop, n))
        rngs = [rng_for(seed, k, ('draw', j), device) for k in index] if j else image_rngs(seed, index, device)
        return start_embedding(conditions[part], rngs), drawing(conditions[part], rngs)

    def optimised(part):
        """TTEO from the best of `starts` draws."""
        score, best = lambda images: reward_sum(rewards, images, captions[part]), None
        for j in range(starts):
            emb, draw = fresh_start(j, part)
            if starts > 1:
                best = keep_better(best, score(draw(emb)[1]), emb)
        return ascend(best[1] if best else emb, draw, score, iterations, lr, clip, pull)

    def fresh_draws(part):
        """Best of N: the first draws are the starts of TTEO."""
        best = None
        for j in range(best_of):
            emb, draw = fresh_start(j, part)
            images = draw(emb)[1]
            score = reward_sum(rewards, images, captions[part])
            best = keep_better(best, score, images)
            yield score, *best, torch.zeros_like(score)

    passes = [passes_of(k, output, starts) for k in range(iterations + 1)]
    best_of = best_of or passes[-1]
    ascent, _, after, ms = run('TTEO', optimised, passes)
    control, before, chosen, ms_control = run('best of N', fresh_draws, range(best_of))
    entries = [('generator', 1, ms_control / best_of, control[0]),
               (f'TTEO, {starts} x {iterations} steps', passes[-1], ms, ascent[-1]),
               (f'best of {best_of}', best_of, ms_control, control[-1])]
    shown_tasks = [t for t in TASKS if (tasks == t).any()]
    print(f'\n{"":22s}passes  ms/image  reward  held-out  followed' + ''.join(f'{t:>15s}' for t in shown_tasks))
    table = []
    for label, cost, time_each, (best, held, right, _, _) in entries:
        shares = {t: float(right[torch.from_numpy(tasks == t)].mean()) for t in shown_tasks}
        table.append(dict(name=label, passes=cost, ms=round(time_each, 2), reward=float(best.mean()),
                          held_out=float(held.mean()), tasks=shares,
                          accuracy=float(right.mean()) if source.is_world else None))
        print(f'{label:22s}{cost:6d}{time_each:10.2f}{best.mean():8.3f}{held.mean():10.3f}{right.mean():10.3f}'
              + ''.join(f'{s:15.3f}' for s in shares.values()))
    print(f'{n} images, seeds ({seed}, 0..{n - 1}), {output} output; they are chosen by the reward, so its value is '
          'no evidence: read the held-out reward and the checker')
    keys = ('kept', 'held_out', 'followed', 'current', 'moved')
    history = lambda rows, cost: [dict(passes=c, **{key: float(v.mean()) for key, v in zip(keys, r)
                                                    if not v.isnan().any()}) for c, r in zip(cost, rows)]
    curves = dict(trajectory=history(ascent, passes), best_of=history(control, range(1, best_of + 1)))
    column, label = ('followed', 'captions followed') if source.is_world else ('held_out', 'held-out reward')
    save_curve(f'{name}-curve.png', {k: [(r['passes'], r[column]) for r in rows]
                                     for k, rows in zip(('TTEO', 'best of N'), curves.values())}, label)
    with writing(f'{name}.json'), open(f'{name}.json', 'w') as file:
        json.dump(dict(config=config, table=table, **curves), file, indent=1)
    pick = torch.linspace(0, n - 1, min(n, 16)).long()
    save_grid(f'{name}.png', torch.cat([before[pick], after[pick], chosen[pick]]), [captions[k] for k in pick] * 3,
              columns=len(pick))
    print(f'{name}.png: before, after, best of {best_of}; {name}-curve.png, {name}.json')
