"""
Stage 3, test-time embedding optimisation (Soft-Di[M]O, arXiv 2509.22925): for one prompt, move the generator's *input
embedding* uphill on the reward; no weight changes. The template is ReNO (arXiv 2406.04312), which moves the noise.

    x_init -> e = embed(x_init) + noise -> z = G(e, c) -> image = decode(softmax(z / tau)) -> R(image, prompt)
              e <- e + lr dR/de, and the best image seen so far is kept, the one before the first step included

Left out: momentum, and ReNO's prior on the noise norm (an embedding has none; --pull is an L2 pull to
the start). Added: a limit on each image's gradient, and starting from the best of several (--starts).
The control is best-of-N: fresh x_init, the best by the same score, at equal passes (a backward counts
as two). The score is the reward of the image that is handed out, so what is kept is what was scored.
The held-out reward and the checker are reported, never looked at.

$ python tteo.py --ckpt out/reward.pt --prompt "a red circle left of a blue square"   # 16 images, before and after
$ python tteo.py --ckpt out/reward.pt                                       # captions of all six tasks: table and curve
$ python tteo.py --ckpt out/distill.pt --best_of 64                         # the control with another N
$ python tteo.py --ckpt out/reward.pt --n=2000 --n_reference=5000           # distances and coverage, too
Expected (2 CPU cores, shapes world): a minute; numbers in assets/RESULTS.md.
"""
import json
import os
import shutil
import time

import numpy as np
import torch

from common.files import check_origin, load_checkpoint, settings_of
from common.metrics import Reference, show_table
from common.pictures import save_curve, save_grid
from common.rewards import (load_held_out, load_rewards, needs_small_rewards, published_in_use, reward_sum,
                            small_reward_origin)
from common.run import (configure, image_rngs, progress, report_bench, results_name, rng_for, start_run, synchronise,
                        try_writing, writable, writing)
from common.teachers import load_teacher, unpack
from model import relaxed, start_embedding

# -----------------------------------------------------------------------------
# I/O
ckpt = 'out/reward.pt'  # any generator: distill.pt, gan.pt, reward.pt; rewards.pt is found beside it
prompt = ''            # one caption for all images; '' = n held-out captions of all tasks
data = ''              # where the images are now that it was trained on, if they have moved
n = 0                  # images, 0 = 16 of one prompt or 300 of all tasks
n_reference = 0        # real images that these are compared with, in distance and coverage; 0 = not compared
seed = 0               # image k follows from (seed, k)
batch = 100            # images per forward pass; lower it when memory runs out
name = ''              # pictures and tables are written as NAME.png, ...; '' = tteo and the settings that were changed,
                       # beside the checkpoint, where tteo.png, ... are the newest
teacher = 'ours'       # of the generator, read from its checkpoint
tokenizer_path = ''    # where a published tokenizer is now, if it moved
text_path = ''         # and the text encoder of a generator that reads text
r_init = 0.6           # this and the next two: as the generator was made, read from its checkpoint unless given
sigma_init = 0.1       # std of the noise on its token embeddings
tau = 1.0              # temperature of the relaxation
# optimisation
starts = 1             # fresh x_init, of which the best is optimised; paper 16
iterations = 10        # gradient steps; paper 4, ReNO 50
lr = 0.2               # SGD; paper .2
clip = 2.0             # largest gradient norm of one image, 0 = none; paper 0, ReNO .1 (with lr 5)
pull = 0.0             # weight of |e - e_start|^2 / 2 per image
relax = 'soft'         # soft, gumbel or st, as in reward.py
output = 'soft'        # the image handed out and scored: soft decode, free here; tokens: argmax, a pass more per step
best_of = 0            # draws of the control, 0 = as many as cost the same passes
half_decoder = True    # decode in bf16 where the device computes in it, for the tables, too
grad_checkpoint = False  # recompute the blocks of generator, decoder and rewards in backward: less memory, more time
bench = False          # time 20 steps of a batch and stop
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
held_out = ''          # rewards of weight 0 that are only reported; '' = the small one; none = none

# What the generator's teacher changes
# (the paper's TTEO is the best of 16 starts and 4 iterations of SGD at .2, unclipped; weights are ReNO's)
RECIPES = {
    'maskgit': dict(clip=0.0),
    'maskbit': dict(clip=0.0),
    'maskgen': dict(starts=16, iterations=4, clip=0.0, batch=4, w_clip=0.0, w_clipscore=0.01,
                    w_hps=5.0, w_pick=0.05, w_imagereward=1.0, held_out='none'),
    'meissonic': dict(starts=16, iterations=4, clip=0.0, batch=1, w_clip=0.0, w_clipscore=0.01,
                      w_hps=5.0, w_pick=0.05, w_imagereward=1.0, held_out='none')}

# Settings that the generator's checkpoint hands on
INHERITED = ('teacher', 'text_path', 'r_init', 'sigma_init', 'tau')

LIMITS = dict(         # a number is the least value, a pair a range, words a choice
    n=0, n_reference=0, batch=1, starts=1, iterations=1, clip=0, best_of=0, relax=('soft', 'gumbel', 'st'),
    output=('soft', 'tokens'), r_init=(0, 1), sigma_init=(0, 1), tau=1e-6,
    teacher=('ours', 'maskgit', 'maskbit', 'maskgen', 'meissonic'))

# What counts only with a choice of `in_use` below; what is named nowhere always counts
USES = {
    'all tasks (no --prompt)': 'n_reference',
    '--teacher=maskgit': 'tokenizer_path',
    '--teacher=maskbit': 'tokenizer_path',
    '--teacher=maskgen': 'tokenizer_path text_path',
    '--teacher=meissonic': 'tokenizer_path text_path',
    '--w_clipscore or --held_out=clipscore': 'clip_path',
    '--w_hps or --held_out=hps': 'clip_path hps_path',
    '--w_pick or --held_out=pick': 'clip_path pick_path',
    '--w_imagereward or --held_out=imagereward': 'imagereward_path bert_path'}
# -----------------------------------------------------------------------------

CHANGED = ()           # the settings that the command line changes: `configure` writes it


# -----------------------------------------------------------------------------
# This stage's equations

def passes_of(iterations, output, starts=1):
    """Network-plus-decoder passes of a run: one per fresh start, a forward for every iterate, a
    backward (two) for every step; where tokens are handed out, their decoding counts as one more
    for every step."""
    fresh = starts if starts > 1 else 0
    per_step = 4 if output == 'tokens' else 3
    return fresh + per_step * iterations + 1


def drawing(loaded, cond, captions, rngs):
    """-> draw(emb (B, L, D)) -> images to differentiate, images handed out: soft decodes, or those
    of the likeliest tokens."""
    decode = loaded.decoder.decode

    def draw(emb):
        logits = loaded.net(emb, cond)
        if output == 'soft' and relax == 'soft':
            images = decode(relaxed(logits, 'soft', tau), captions)
            return images, images
        if output == 'soft':
            handed_out = decode(relaxed(logits.detach(), 'soft', tau), captions)
        else:
            handed_out = decode(logits.argmax(-1), captions)           # from ids: no graph
        if not emb.requires_grad:
            return handed_out, handed_out
        return decode(relaxed(logits, relax, tau, rngs), captions), handed_out
    return draw


def keep_better(best, score, x):
    """(score (B,), images or embeddings) and a new pair -> row by row the better one, the earlier
    one if equal."""
    if best is None:
        return score, x
    better = score > best[0]
    rows = better.view(-1, *[1] * (x.dim() - 1))
    return torch.where(better, score, best[0]), torch.where(rows, x, best[1])


def step_up(emb, start, value):
    """e + lr dR/de, each image by itself, its gradient at most `clip` long (Soft-Di[M]O, arXiv
    2509.22925, TTEO)."""
    pulled = value.sum() - pull / 2 * (emb - start).square().sum()
    grad, = torch.autograd.grad(pulled, emb)
    if clip:
        norm = grad.flatten(1).norm(dim=1)[:, None, None]
        return emb + lr * grad * (clip / norm.clamp(min=clip))
    return emb + lr * grad


def ascend(emb, draw, score):
    """SGD on the input embedding (B, L, D). draw(emb) -> (images to differentiate, images handed
    out); score(images) -> (B,). Yields per iterate: score, kept score, kept images, distance from
    the start."""
    start, best = emb, None
    for k in range(iterations + 1):
        climbing = k < iterations
        emb = emb.detach().requires_grad_(climbing)
        with torch.set_grad_enabled(climbing):
            images, handed_out = draw(emb)
            value = score(images)                      # (B,)
        with torch.no_grad():
            shown = value.detach() if handed_out is images else score(handed_out)
            best = keep_better(best, shown, handed_out.detach())
        yield shown, *best, (emb.detach() - start).flatten(1).norm(dim=1)
        if climbing:
            emb = step_up(emb, start, value)


# -----------------------------------------------------------------------------
# The two ways to spend passes. part: which images (a slice); everything of an image follows from (seed, k)

def fresh_start(loaded, captions, part, j):
    """Start j of these images -> embedding (B, L, D), its `draw`; 0 is what sample.py draws
    from."""
    index = range(part.start, part.start + len(captions[part]))
    if j:
        rngs = [rng_for(seed, k, ('draw', j), loaded.device) for k in index]
    else:
        rngs = image_rngs(seed, index, loaded.device)
    cond = loaded.encode(captions[part])
    emb = start_embedding(loaded.net, len(index), r_init, sigma_init, rngs)
    return emb, drawing(loaded, cond, captions[part], rngs)


def optimised(loaded, captions, rewards, part):
    """TTEO from the best of `starts` draws: what `ascend` yields."""
    def score(images):
        return reward_sum(rewards, images, captions[part])
    best = None
    for j in range(starts):
        emb, draw = fresh_start(loaded, captions, part, j)
        if starts > 1:
            best = keep_better(best, score(draw(emb)[1]), emb)
    if best:
        emb = best[1]
    return ascend(emb, draw, score)


def control_draws():
    """N of the control: as many draws as cost what TTEO costs, unless given."""
    return best_of or passes_of(iterations, output, starts)


def fresh_draws(loaded, captions, rewards, part):
    """Best of N: the first draws are the starts of TTEO. Yields as `ascend`."""
    best = None
    for j in range(control_draws()):
        emb, draw = fresh_start(loaded, captions, part, j)
        images = draw(emb)[1]
        score = reward_sum(rewards, images, captions[part])
        best = keep_better(best, score, images)
        yield score, *best, torch.zeros_like(score)


COLUMNS = ('kept', 'held_out', 'followed', 'current', 'moved')


def collect(label, method, n_iterates, loaded, captions, rewards, report):
    """Run a method batch by batch -> {column: (iterates, n)}; the images of the first and of the
    last iterate; milliseconds per image without the reporting."""
    rows, first, last = [[] for _ in range(n_iterates)], [], []
    spent, bar = 0.0, progress(len(captions) * n_iterates, label)
    for begin in range(0, len(captions), batch):
        part = slice(begin, begin + batch)
        clock = time.time()
        for k, (shown, best, images, moved) in enumerate(method(loaded, captions, rewards, part)):
            synchronise(loaded.device)
            spent += time.time() - clock
            if k == 0:
                first.append(images.cpu())
            held, right = report(images, captions[part])
            rows[k].append(torch.stack([best, held, right, shown, moved]).double().cpu())
            bar.update(len(images))
            clock = time.time()
        last.append(images.cpu())
    bar.close()
    table = torch.stack([torch.cat(row, 1) for row in rows], 1)        # (5, iterates, n)
    columns = dict(zip(COLUMNS, table))
    return columns, torch.cat(first), torch.cat(last), spent * 1000 / len(captions)


def history(columns, passes):
    """A row per iterate: its passes and the mean of each column that is known."""
    rows = []
    for k, cost in enumerate(passes):
        row = dict(passes=cost)
        for key, values in columns.items():
            if not values[k].isnan().any():
                row[key] = float(values[k].mean())
        rows.append(row)
    return rows


def show_entries(entries, tasks, task_names):
    """Print a row per (label, passes, ms, columns, iterate) -> rows for the JSON file."""
    print(f'\n{"":22s}passes  ms/image  reward  held-out  followed' + ''.join(f'{t:>15s}' for t in task_names))
    table = []
    for label, cost, milliseconds, columns, k in entries:
        reward, held, right = (columns[key][k] for key in ('kept', 'held_out', 'followed'))
        shares = {t: float(right[torch.from_numpy(tasks == t)].mean()) for t in task_names}
        accuracy = None if right.isnan().any() else float(right.mean())
        table.append(dict(name=label, passes=cost, ms=round(milliseconds, 2), reward=float(reward.mean()),
                          held_out=float(held.mean()), tasks=shares, accuracy=accuracy))
        print(f'{label:22s}{cost:6d}{milliseconds:10.2f}{reward.mean():8.3f}{held.mean():10.3f}{right.mean():10.3f}'
              + ''.join(f'{share:15.3f}' for share in shares.values()))
    return table


def check_small_rewards(world_file, loaded):
    """Raise ValueError unless the small reward models were made for the generator's data."""
    if not loaded.data:
        raise ValueError(f'{ckpt}: was made without data, so there are no small reward models; use published ones, as '
                         'in --w_clip=0 --w_hps=5 --held_out=none')
    made = load_checkpoint(world_file, 'rewards', 'Make it with: python reward.py', fallback=True)
    check_origin(world_file, made, small_reward_origin(loaded))


def load_generator(run):
    """-> the generator with what surrounds it; with --bench also a teacher of random weights."""
    if bench and ckpt == 'random':
        return load_teacher(teacher, ckpt, ckpt, '', 0, run.device, ckpt)
    state = load_checkpoint(ckpt, 'distill|gan|reward', 'Make one with: python reward.py', fallback=True)
    loaded = unpack(state, run.device, 'ema', tokenizer_path, ckpt, text_path)
    loaded.data = data or loaded.data
    return loaded


def time_a_step(loaded, captions, rewards, run):
    """--bench: a gradient step of TTEO on as many images as there are captions."""
    start, draw = fresh_start(loaded, captions, slice(0, len(captions)), 0)

    def step():
        emb = start.detach().requires_grad_() * 1      # no leaf, on which the counter of FLOPs trips
        images, handed_out = draw(emb)
        value = reward_sum(rewards, images, captions)
        if handed_out is not images:
            reward_sum(rewards, handed_out, captions)
        step_up(emb, start, value)
    report_bench(step, len(captions), run)


def in_use(s):
    """Which words of USES count with the settings `s`."""
    words = [f'--teacher={s.teacher}', *published_in_use(s)]
    if not s.prompt:
        words.append('all tasks (no --prompt)')
    return words


def handed_on(settings):
    """What the generator's checkpoint says that it was made with."""
    if settings['bench'] and settings['ckpt'] == 'random':
        return {}
    return settings_of(settings['ckpt'], INHERITED)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals(), RECIPES, handed_on)
    run = start_run(half=())
    if run.world > 1:
        raise ValueError('runs as one process; start it with python, not torchrun')

    # Load the generator and the rewards
    loaded = load_generator(run)
    folder = os.path.dirname(ckpt)
    world_file = os.path.join(folder, 'rewards.pt')
    stem = newest = name
    if not name and not bench:
        newest = writable(os.path.join(folder, 'tteo.json')).removesuffix('.json')
        stem = newest.removesuffix('tteo') + results_name('tteo', config, CHANGED)
    if not bench:
        try_writing(f'{stem}.json')                    # before slow work
    if needs_small_rewards(config):
        check_small_rewards(world_file, loaded)
    rewards = load_rewards(config, world_file, run.device)
    if not rewards:
        raise ValueError('every reward has weight 0; give one, as in --w_clip=1')
    judges = {}
    if held_out != 'none' and not bench:
        judges = load_held_out(config, world_file, run.device)

    loaded.choose_decoder(run, half_decoder, grad_checkpoint)
    loaded.net.checkpointing = grad_checkpoint

    # Choose the captions
    n_images = n or (16 if prompt else 300)
    if bench:
        n_images = batch
    captions = [prompt] * n_images
    if not prompt and loaded.data:
        captions = loaded.source.captions(loaded.source.test_examples(n_images))
    elif not prompt:
        captions = loaded.examples(n_images)
    loaded.encode(captions[:1])                        # an unknown word is said before slow work
    if bench:
        time_a_step(loaded, captions, rewards, run)
        raise SystemExit
    tasks, task_names, checked = np.array([''] * n_images), [], False
    if loaded.data:
        tasks, checked = np.array(loaded.source.tasks(captions)), loaded.source.judges
        task_names = [t for t in loaded.source.task_names if (tasks == t).any()]

    def report(images, captions):
        """The judges that choose nothing: first held-out reward and checker, (B,) each."""
        unknown = torch.full((len(images),), np.nan, device=run.device)
        held, right = unknown, unknown
        for judge in list(judges.values())[:1]:
            held = judge(images, captions)
        if checked:
            right = torch.from_numpy(loaded.source.follows(images, captions)).to(run.device)
        return held, right

    # Load what the images are compared with
    reference = None
    if n_reference:
        if min(n_images, n_reference) < 4:
            raise ValueError(f'--n={n_images} --n_reference={n_reference}: a distance needs at least 4 images each')
        reference = Reference.of(loaded, folder, n_reference)
        if not reference:
            raise ValueError(f'{ckpt}: was made without data, so there is nothing to compare with; leave out '
                             '--n_reference')

    # Run both
    passes = [passes_of(k, output, starts) for k in range(iterations + 1)]
    draws = control_draws()
    ascent, _, after, ms = collect('TTEO', optimised, len(passes), loaded, captions, rewards, report)
    control, before, chosen, ms_control = collect('best of N', fresh_draws, draws, loaded, captions, rewards, report)

    # Print the table, draw the curve and the pictures
    table = show_entries([('generator', 1, ms_control / draws, control, 0),
                          (f'TTEO, {starts} x {iterations} steps', passes[-1], ms, ascent, -1),
                          (f'best of {draws}', draws, ms_control, control, -1)], tasks, task_names)
    print(f'{n_images} images, seeds ({seed}, 0..{n_images - 1}), {output} output; they are chosen by the reward, so '
          'its value is no evidence: read the held-out reward and the checker')
    distances = []
    if reference:
        for row, images in zip(table, (before, after, chosen)):
            measured = reference.measure(images, captions)
            distances.append(dict(name=row['name'], passes=row['passes'], ms=row['ms'], **measured))
        show_table(distances)
    trajectory, best_of_n = history(ascent, passes), history(control, range(1, draws + 1))
    column, label = 'kept', 'reward'
    if judges:
        column, label = 'held_out', 'held-out reward'
    if checked:
        column, label = 'followed', 'captions followed'
    save_curve(f'{stem}-curve.png', {'TTEO': [(row['passes'], row[column]) for row in trajectory],
                                     'best of N': [(row['passes'], row[column]) for row in best_of_n]}, label)
    with writing(f'{stem}.json'), open(f'{stem}.json', 'w', encoding='utf-8') as file:
        json.dump(dict(config=config, table=table, distances=distances, trajectory=trajectory,
                       best_of=best_of_n), file, indent=1)
    pick = torch.linspace(0, n_images - 1, min(n_images, 16)).long()
    save_grid(f'{stem}.png', torch.cat([before[pick], after[pick], chosen[pick]]), [captions[k] for k in pick] * 3,
              columns=len(pick))
    print(f'{stem}.png: before, after, best of {draws}; {stem}-curve.png, {stem}.json')
    if newest != stem:
        for end in ('.png', '-curve.png', '.json'):
            shutil.copyfile(stem + end, newest + end)
        print(f'the same: {newest}.png, ...')
