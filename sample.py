"""
Draw images from any checkpoint, as a grid, as PNG files, or as numbers.

The file says what it is: a teacher (out/model.pt) is sampled in --steps passes, a generator (out/distill.pt) in one.
Image k depends on --seed and k only, so it is the same image whatever the batch size.

$ python sample.py --ckpt out/distill.pt                                       # 32 captions of the data -> grid
$ python sample.py --ckpt out/distill.pt --prompt "a red circle left of a blue square" --n 16
$ python sample.py --ckpt out/model.pt --steps 16 --cfg_scale 3 --gumbel 4 --n 64 --png_dir out/png
$ python sample.py --ckpt out/distill.pt --metrics                             # toy FD, precision/recall, checker
$ python sample.py --teacher=maskgit --teacher_path=... --tokenizer_path=... --label=207 --steps=8
$ python sample.py --ckpt out/model.pt --sweep                                 # guidance x Gumbel temperature
$ python sample.py --teacher=maskgit --teacher_path=random --steps=16 --bench  # images per second, without any file
$ torchrun --nproc_per_node=8 sample.py --ckpt out/distill.pt --metrics --n_metrics=50000 --batch=64 \
      --inception=inception-2015-12-05.pt --ref=VIRTUAL_imagenet256_labeled.npz    # FID, IS; README.md: where from
Expected: a grid of 32 images within seconds on 2 CPU cores.
"""
import glob
import hashlib
import json
import os
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from model import (MDM, Images, Reference, Tokenizer, configure, end_processes, frechet_distance, image_rngs,
                   load_checkpoint, load_teacher, one_step, precision_recall, progress, render, restore, rng_for,
                   sample_teacher, save_grid, show_table, start_processes, teacher_passes, timed, word_ids, writing)
from tokenizer import WORLDS

# -----------------------------------------------------------------------------
ckpt = 'out/distill.pt'  # any model.pt, distill.pt, ...
teacher = 'ours'       # instead of a checkpoint: maskgit or maskbit, published weights
teacher_path = ''      # file of a published teacher
teacher_heads = 0      # its attention heads, which the file does not tell; 0 = 16
tokenizer_path = ''    # file of its tokenizer; also where that of a checkpoint is now, if it moved
student = False        # the published weights are a one-step generator: Di[M]O's student
prompt = ''            # one caption for all images; '' takes captions of the training data
label = ''             # class name or number, for a model trained on a folder
n = 32                 # images
seed = 0               # image k follows from (seed, k)
steps = 0              # steps of a teacher, 0 = 16; a generator takes one
cfg_scale = 1.5        # teacher guidance u + s (c - u) at the last step, rising from 1
gumbel = 8.0           # Gumbel temperature of the teacher's confidence, falling to 0
law = ''               # its counts and guidance: maskgit or maskbit, '' = what the network is
power = 3.0            # exponent of the guidance in the maskbit law; published 2.5 or 3
tau = 1.0              # softmax temperature times the run's tau_sample: below 1 more typical, above 1 more varied
top_k = 0              # keep this many codes per position, 0 = all
top_p = 0.0            # keep the likeliest codes up to this total probability, 0 = all
batch = 250            # images per forward pass; lower it when memory runs out
weights = 'ema'        # ema (averaged) or net (the last iterate)
grid = ''              # picture to write, '' = samples.png beside the checkpoint
png_dir = ''           # also write every image as a PNG file into this folder
metrics = False        # measure n_metrics images instead of drawing a grid
n_metrics = 2000       # images behind each number
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
data = ''              # reference of the metrics: '' = what the checkpoint was trained on, or a folder
inception = ''         # with --metrics: the file inception-2015-12-05.pt gives FID and IS instead of toy FD
ref = ''               # its reference, the npz of the ADM suite: mu, sigma, and arr_0 (images) for precision/recall
sweep = False          # measure a teacher over guidance 1, 1.5, 2, 3 x Gumbel temperature 1, 2, 4, 8
bench = False          # time network and decoder apart on one batch and stop
# -----------------------------------------------------------------------------

def choose_captions(prompt, label, n, words, prompts):
    """The captions to draw: the prompt n times, the class n times (a name wins over a number, as digits are called
    0..9), or n training captions spread over prompts (M, T)."""
    if label and prompts.shape[1] > 1:
        raise SystemExit('sample.py: --label needs a model trained on class folders; this one reads captions, '
                         'try --prompt "a red circle"')
    if label:
        names = [w for w in words if w == label] or [w for k, w in enumerate(words) if str(k) == label]
        if not names:
            raise SystemExit(f'sample.py: --label={label!r} is no class of this model; '
                             f'try one of {", ".join(words[:40])}')
        return names * n
    if prompt:
        return [prompt] * n
    rows = prompts[torch.linspace(0, len(prompts) - 1, n).long()].tolist()
    return [' '.join(words[k] for k in row if k < len(words)) for row in rows]


def write_pngs(folder, images, captions):
    """One PNG per image, 00000.png ..., and captions.txt with one line each."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    names = os.path.join(folder, 'captions.txt')
    with writing(names):
        for old in glob.glob(glob.escape(folder) + '/[0-9][0-9][0-9][0-9][0-9].png') if os.path.exists(names) else ():
            os.remove(old)                                                               # of an earlier call
        for k, array in enumerate(pixels):
            Image.fromarray(array).save(os.path.join(folder, f'{k:05d}.png'))
        with open(names, 'w', encoding='utf-8') as file:
            file.writelines(f'{k:05d}.png\t{caption}\n' for k, caption in enumerate(captions))


class Moments:
    """Mean and covariance of features in float64 from partial sums: `add` rows (B, d), `merge` all processes."""

    def __init__(self, d, device='cpu'):
        self.sums = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)

    def add(self, x):
        x = F.pad(x.double(), (0, 1), value=1)                               # [x, 1]^T [x, 1]: products, sums, count
        self.sums += x.T @ x

    def merge(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self):
        """-> mean (d,), covariance (d, d)."""
        n, mean = self.sums[-1, -1], self.sums[-1, :-1] / self.sums[-1, -1]
        return mean, (self.sums[:-1, :-1] - n * mean[:, None] * mean) / (n - 1)


def inception_score(probs, split=5000):
    """exp of the mean KL(p(y | x) || p(y)) (Salimans et al. 2016) in consecutive splits of class probabilities (n, K),
    averaged over the splits. Labels must be in random order, or a split sees few classes."""
    gain = lambda p: (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp()
    return float(torch.stack([gain(p) for p in probs.double().split(split)]).mean())


def load_inception(path, device):
    """The TorchScript Inception network that the user names, a program: uint8 images (B, 3, H, W) -> features
    (B, 2048), class probabilities (B, 1008). -> that function, sha256 of the file. Exits with one line."""
    try:
        digest = hashlib.sha256(open(path, 'rb').read()).hexdigest()
        network = torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f'{path}: not readable as TorchScript ({str(error).splitlines()[0][:80]}); expected '
                         'inception-2015-12-05.pt, see README.md') from None
    torch.backends.cudnn.allow_tf32 = False
    return lambda x: (network(x, return_features=True).float(), network(x, no_output_bias=True).float()), digest


def balanced_labels(n, K, seed):
    """n class labels (n,): one random permutation of the K classes, repeated."""
    return torch.randperm(K, generator=rng_for(seed, 0, 'labels')).repeat(-(-n // K))[:n]


def to_uint8(images):
    """[-1, 1] -> 0..255: clip(127.5 x + 128), truncated, as Di[M]O's evaluation does."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def inception_metrics(draw, tokenizer, labels, network, ref, seed, batch, device):
    """FID, IS, precision and recall of images that draw(cond, rngs) makes for labels (n,). `network` gives features
    and probabilities; `ref` is the open npz. Batch k belongs to process k mod world; image i follows from (seed, i).
    The result is a dict on every process; fewer than 50,000 images are called FID@n."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    n, (x, p) = len(labels), network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
    wanted = tuple(torch.from_numpy(ref[key]).double().to(device) for key in ('mu', 'sigma'))
    if [tuple(w.shape) for w in wanted] != [(x.shape[1],), (x.shape[1],) * 2]:
        raise SystemExit(f'--ref: mu has shape {tuple(wanted[0].shape)}, the network gives {x.shape[1]} features')
    moments, features, probs = (Moments(x.shape[1], device), torch.zeros(n, x.shape[1], device=device),
                                torch.zeros(n, p.shape[1], device=device))
    bar = progress(n, 'samples for FID')
    for start in range(rank * batch, n, world * batch):
        index = range(start, min(start + batch, n))
        tokens = draw(labels[list(index)].to(device), image_rngs(seed, index, device))
        pixels = torch.cat([to_uint8(tokenizer.decode(t)) for t in tokens.split(tokenizer.batch)])
        features[start:index[-1] + 1], probs[start:index[-1] + 1] = x, p = network(pixels)
        moments.add(x)
        bar.update(min(world * batch, n - start))
    bar.close()
    moments.merge()
    if world > 1:                                                            # each row is zero on all but one process
        dist.all_reduce(features)
        dist.all_reduce(probs)
    name = 'FID' if n >= 50_000 else f'FID@{n}'
    row = {name: frechet_distance(moments.result(), wanted), 'IS': inception_score(probs)}
    if 'arr_0' in ref:
        real = torch.from_numpy(ref['arr_0']).permute(0, 3, 1, 2)            # (M, 3, H, W) uint8
        real = torch.cat([network(r.to(device))[0] for r in real.split(batch)])
        row['precision'], row['recall'] = precision_recall(real, features)
    return row


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals())
    rank, world, device, autocast = start_processes(half=('cuda',))  # float32 on a CPU, as in the stages' tables
    if world > 1 and not (metrics and inception):
        raise SystemExit('sample.py: runs as one process, except for --metrics --inception=...; start it with python')
    if n < 1:
        raise SystemExit(f'sample.py: --n={n} images; give at least 1')
    if (metrics or sweep) and (prompt or label or png_dir):
        raise SystemExit('sample.py: --metrics and --sweep use captions of the data and write no images; leave out '
                         '--prompt, --label and --png_dir')
    if teacher == 'ours':
        state = load_checkpoint(ckpt, 'model|distill|gan|reward', 'Make one with: python distill.py', fallback=True)
    else:
        state = load_teacher(teacher, teacher_path, tokenizer_path, data, teacher_heads)
        ckpt = f'out/{teacher}.pt'
    model = MDM(**state['args']).to(device).eval().requires_grad_(False)
    if weights not in state:
        raise SystemExit(f'sample.py: {teacher} has one set of weights; leave --weights=ema')
    restore(model, state[weights], ckpt, weights)
    tokenizer = Tokenizer.from_checkpoint(state['tokenizer'], tokenizer_path).to(device)
    words, length, is_teacher = state['words'], state['args']['T'], state['stage'] == 'model' and not student
    made = {'r_init': 0.6, 'sigma_init': 0.1, 'tau_sample': 1.0, **state['config']}  # the paper's, or the run's
    tau *= made['tau_sample']
    if data not in ('', *WORLDS) and words == [str(k) for k in range(len(words))]:  # call classes as the data do
        named = list(Images(data, tokenizer.config['image_size']).words)
        words = named if len(named) == len(words) else words
    if not is_teacher and (steps > 1 or sweep):
        raise SystemExit(f'{ckpt}: is a one-step generator; --steps and --sweep are for a teacher, as in out/model.pt')
    steps = (steps or min(16, model.N)) if is_teacher else 1
    if steps > model.N:
        raise SystemExit(f'sample.py: --steps={steps} is more than the {model.N} tokens of an image; '
                         f'try --steps={model.N}')

    def sampler(cfg_scale, gumbel):
        """cond, rng -> tokens, for this checkpoint."""
        def draw(cond, rng):
            with autocast:
                if is_teacher:
                    return sample_teacher(model, cond, steps, cfg_scale, gumbel, tau, rng, top_k, top_p, law, power)
                return one_step(model, cond, made['r_init'], made['sigma_init'], tau, rng, top_k, top_p)[1]
        return draw

    def conditions(captions):
        try:
            return word_ids(captions, words, length)
        except ValueError as error:
            raise SystemExit(f'sample.py: {error}') from None

    def passes(cfg_scale):
        return teacher_passes(model, steps, cfg_scale, law, power) if is_teacher else 1

    if bench:
        cond = conditions(choose_captions(prompt, label, batch, words, state['prompts'])).to(device)
        draw, rngs = sampler(cfg_scale, gumbel), image_rngs(seed, range(batch), device)
        parts = draw(cond, rngs).split(tokenizer.batch)
        decode = lambda: [tokenizer.decode(part) for part in parts]
        decode()
        network, decoder = (batch / timed(call, 3, device) for call in (lambda: draw(cond, rngs), decode))
        print(f'bench: steps {steps}, passes {passes(cfg_scale)}, batch {batch}, images_per_s of the network '
              f'{network:.1f}, of the decoder {decoder:.1f}, of both {1 / (1 / network + 1 / decoder):.1f}')
        raise SystemExit

    if metrics and inception:
        if length > 1:
            raise SystemExit(f'sample.py: --inception needs a model of classes; {ckpt} reads captions')
        network, digest = load_inception(inception, device)
        try:
            reference = np.load(ref)
            reference['mu'], reference['sigma']
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise SystemExit(f'sample.py: --ref={ref}: {type(error).__name__}; expected an npz with mu and sigma, as '
                             'the ADM suite publishes (see README.md)') from None
        labels = balanced_labels(n_metrics, state['args']['n_words'], seed)
        row = inception_metrics(sampler(cfg_scale, gumbel), tokenizer, labels, network, reference, seed, batch, device)
        if rank == 0:
            print(', '.join(f'{k} {v:.4g}' for k, v in row.items()) + f' ({n_metrics} images, seeds ({seed}, k), '
                  f'{passes(cfg_scale)} network pass(es), reference {ref}, Inception {inception} sha256 {digest})')
            if 'arr_0' not in reference:
                print(f'no precision and recall: {ref} holds no images (arr_0)')
            path = f'{os.path.splitext(ckpt)[0]}-inception.json'
            with writing(path), open(path, 'w') as file:
                json.dump(dict(row, ckpt=ckpt, step=state['step'], seed=seed, ref=ref, sha256=digest), file)
            print(f'-> {path}')
        end_processes()
        raise SystemExit

    if metrics or sweep:
        if not (data or state['data']):
            raise SystemExit('sample.py: nothing to measure against; give --data=FOLDER, or --inception and --ref')
        source = Images(data or state['data'], tokenizer.config['image_size'], expected=words)
        reference = Reference(source, n_reference)
        captions, real = reference.prompts(n_metrics)
        settings = [(cfg_scale, gumbel)]
        if sweep:
            settings = [(s, g) for s in (1.0, 1.5, 2.0, 3.0) for g in (1.0, 2.0, 4.0, 8.0)]
        entries = [dict(name='real images', passes=0, ms=0.0, **reference.measure(real, captions))]
        for s, g in settings:
            images, ms = render(sampler(s, g), tokenizer, conditions(captions), seed, batch)
            name = f'cfg {s:g} gumbel {g:g}' if is_teacher else os.path.basename(ckpt)
            entries.append(dict(name=name, passes=passes(s), ms=round(ms, 2), **reference.measure(images, captions)))
            if sweep:
                print(f'{name}: toy FD {entries[-1]["toy_fd"]:.2f}, followed {entries[-1]["accuracy"]:.3f}', flush=True)
        show_table(entries)
        print(f'image seeds ({seed}, 0..{n_metrics - 1}), {steps} step(s), tau {tau:g}, weights {weights} of training '
              f'step {state["step"]}')
        path = f'{os.path.splitext(ckpt)[0]}-{"sweep" if sweep else "metrics"}{f"-{seed}" if seed else ""}.json'
        with writing(path), open(path, 'w') as file:
            json.dump(dict(ckpt=ckpt, step=state['step'], seed=seed, rows=entries), file, indent=1)
        print(f'-> {path}')
        raise SystemExit

    captions = choose_captions(prompt, label, n, words, state['prompts'])
    images, ms = render(sampler(cfg_scale, gumbel), tokenizer, conditions(captions), seed, batch)
    path = grid or os.path.join(os.path.dirname(ckpt), 'samples.png')
    save_grid(path, images, captions)
    if png_dir:
        write_pngs(png_dir, images, captions)
    print(f'{n} images, seeds ({seed}, 0..{n - 1}), {passes(cfg_scale)} network pass(es), {ms:.1f} ms per image on '
          f'{device} -> {path}' + (f' and {png_dir}/' if png_dir else ''))
