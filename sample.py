"""
Draw images from any checkpoint, as a grid, as PNG files, or as numbers.

The file says what it is: a teacher (out/model.pt) is sampled in --steps passes, a generator (out/distill.pt) in one.
Image k depends on --seed and k only, so it is the same image whatever the batch size.

$ python sample.py --ckpt out/distill.pt                                       # 32 captions of the data -> grid
$ python sample.py --ckpt out/distill.pt --prompt "a red circle left of a blue square" --n 16
$ python sample.py --ckpt out/model.pt --steps 16 --cfg_scale 3 --gumbel 4 --n 64 --png_dir out/png
$ python sample.py --ckpt out/distill.pt --metrics                             # distances, precision/recall, checker
$ python sample.py --teacher=maskgit --teacher_path=... --tokenizer_path=... --label=207
$ python sample.py --ckpt out/model.pt --sweep                                 # guidance x Gumbel temperature
$ python sample.py --teacher=maskgit --teacher_path=random --steps=16 --bench  # images per second, without any file
$ torchrun --nproc_per_node=8 sample.py --ckpt out/distill.pt --metrics --n_metrics=50000 --batch=64 \
      --inception=inception-2015-12-05.pt --ref=VIRTUAL_imagenet256_labeled.npz    # FID, IS; RESULTS.md, section 10: where from
$ python sample.py --inception=inception-2015-12-05.pt --ref=mine.npz --ref_from=FOLDER    # a reference of one's own
$ torchrun --nproc_per_node=8 -- sample.py --ckpt out/distill.pt --n=50000 --npz=out/50000.npz    # for the ADM suite
Expected: a grid of 32 images within seconds on 2 CPU cores.
"""
import json
import os
from types import SimpleNamespace

import numpy as np
import torch

from common.benchmarks import check_new, draw_folder, pack_folder, plain_jobs, read_jobs, read_pixels, write_npz
from common.files import load_checkpoint, settings_of
from common.folders import is_image
from common.images import open_data, word_encoder
from common.metrics import (NoReference, Reference, balanced_labels, folder_moments, folder_pixels, in_short,
                            inception_metrics, late_metrics, load_inception, read_reference, render, show_table)
from common.pictures import save_grid
from common.reader import load_reader
from common.rewards import mean_scores, published_scores
from common.run import (configure, end_run, image_rngs, results_files, start_run, timed, try_writing, writable,
                        writing)
from common.teachers import load_teacher, unpack
from common.text import PromptFile
from common.world import WORLDS
from model import sample_teacher, student_sampler, teacher_passes
from tokenizer import hash_of_weights

# -----------------------------------------------------------------------------
ckpt = 'out/distill.pt'  # any model.pt, distill.pt, ...
teacher = 'ours'       # instead of a checkpoint: maskgit, maskbit, maskgen or meissonic, published weights
teacher_path = ''      # file of a published teacher
teacher_heads = 0      # its attention heads, which the file does not tell; 0 = as published
teacher_grid = 0       # tokens a side of a Meissonic, which the file does not tell; 0 = as published
tokenizer_path = ''    # file of its tokenizer; also where that of a checkpoint is now, if it moved
text_path = ''         # CLIP text encoder of maskgen or meissonic; also where that of a checkpoint is now
prompts = ''           # file of prompts of a model that reads text; with --layout the benchmark's file or folder
student = False        # the published weights are a one-step generator: Di[M]O's student
r_init = 0.6           # this and the next two: as a generator was made, read from its checkpoint unless given
sigma_init = 0.1       # std of the noise on its token embeddings
tau_sample = 1.0       # temperature of its tokens
prompt = ''            # one caption for all images; '' takes captions of the training data
label = ''             # class name or number, for a model trained on a folder
n = 32                 # images
seed = 0               # image k follows from (seed, k)
steps = 0              # steps of a teacher, 0 = 16; a generator takes one
cfg_scale = 1.5        # teacher guidance u + s (c - u) at the last step, rising from 1
gumbel = 8.0           # Gumbel temperature of the teacher's confidence, falling to 0
law = ''               # its counts and guidance: maskgit, maskbit, maskgen or meissonic, '' = what the network is
power = 3.0            # exponent of the guidance in the maskbit law; published 2.5 or 3
tau = 1.0              # softmax temperature times the run's tau_sample: below 1 more typical, above 1 more varied
top_k = 0              # keep this many codes per position, 0 = all
top_p = 0.0            # keep the likeliest codes up to this total probability, 0 = all
batch = 250            # images per forward pass; lower it when memory runs out
half_decoder = True    # decode the grid in bf16 where the device computes in it; tables and folders decode in float32
weights = 'ema'        # ema (averaged) or net (the last iterate)
grid = ''              # picture to write, '' = samples.png beside the checkpoint
png_dir = ''           # also write every image as a PNG file into this folder, as it is drawn; what is there is kept
npz = ''               # and all of them into this file for the ADM suite; png_dir '' = its name without .npz
layout = ''            # write the images of a benchmark into png_dir: geneval, hpsv2 or mjhq
metrics = False        # measure n_metrics images instead of drawing a grid
n_metrics = 2000       # images behind each number
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
data = ''              # reference of the metrics: '' = what the checkpoint was trained on, or a folder
inception = ''         # with --metrics: the file inception-2015-12-05.pt gives FID and IS instead of the distances
inception_sha256 = ''  # run it only if this is its digest, which is printed before
ref = ''               # its reference, the npz of the ADM suite: mu, sigma, and arr_0 (images) for precision/recall
ref_from = ''          # make that npz from this folder of images and stop
ref_size = 256         # pixels a side to which they are cropped and resized
clip_path = ''         # with --metrics, means of published rewards whose files are given: CLIP ViT-H/14, folder or hub id,
hps_path = ''          # HPSv2.1 (and clip_path, for its words),
pick_path = ''         # PickScore (likewise),
imagereward_path = ''  # ImageReward
bert_path = 'bert-base-uncased'        # and its word pieces
sweep = False          # measure a teacher over guidance 1, 1.5, 2, 3 x Gumbel temperature 1, 2, 4, 8
bench = False          # time network and decoder apart on one batch and stop

# What --teacher=NAME changes: the published sampler (14 bits for MaskBit)
RECIPES = {'maskgit': dict(steps=8, cfg_scale=4.0, gumbel=4.5, batch=64),
           'maskbit': dict(steps=64, cfg_scale=8.1, gumbel=7.8, power=3.0, batch=64),
           'maskgen': dict(steps=16, cfg_scale=13.0, gumbel=2.0, batch=32),
           'meissonic': dict(steps=64, cfg_scale=9.0, gumbel=2.0, batch=2)}

# Settings that a generator's checkpoint hands on
INHERITED = ('text_path', 'r_init', 'sigma_init', 'tau_sample')

LIMITS = dict(         # a number is the least value, a pair a range, words a choice
    teacher=('ours', 'maskgit', 'maskbit', 'maskgen', 'meissonic'),
    law=('', 'maskgit', 'maskbit', 'maskgen', 'meissonic'),
    layout=('', 'geneval', 'hpsv2', 'mjhq'),
    weights=('ema', 'net'),
    n=1, steps=0, tau=1e-6, top_k=0, top_p=(0, 1), batch=1, n_metrics=4, n_reference=4,
    r_init=(0, 1), sigma_init=(0, 1), tau_sample=1e-6, power=0, ref_size=1)

# What counts only with a choice of `in_use` below; what is named nowhere always counts
REWARDS = 'clip_path hps_path pick_path imagereward_path'
PUBLISHED = 'teacher_path teacher_heads student'
USES = {
    '--ref_from --inception --ref': 'ref_from ref ref_size inception inception_sha256',
    '--metrics --inception --ref': 'metrics n_metrics inception inception_sha256 ref layout prompts cfg_scale gumbel',
    '--metrics': f'metrics n_metrics n_reference cfg_scale gumbel {REWARDS}',
    '--metrics and rewards': 'prompts',
    '--sweep': f'metrics sweep n_metrics n_reference {REWARDS}',
    '--imagereward_path': 'bert_path',
    '--layout --prompts, and --png_dir or --npz': 'layout prompts png_dir npz cfg_scale gumbel',
    '--bench': 'bench half_decoder cfg_scale gumbel',
    'drawing': 'n grid png_dir npz half_decoder cfg_scale gumbel',
    'drawing texts': 'prompt prompts',
    'drawing a class': 'label',
    'a model': 'seed steps law power tau tau_sample top_k top_p r_init sigma_init tokenizer_path data',
    '--teacher=ours': 'ckpt weights text_path',
    '--teacher=maskgit': PUBLISHED,
    '--teacher=maskbit': PUBLISHED,
    '--teacher=maskgen': f'{PUBLISHED} text_path',
    '--teacher=meissonic': f'{PUBLISHED} text_path teacher_grid'}
TEACHERS_OWN = ('steps', 'cfg_scale', 'gumbel', 'law', 'power', 'sweep')     # without effect on a one-step generator
GENERATORS_OWN = ('r_init', 'sigma_init')                                   # the reverse
MADE_BY = ('weights', 'seed', 'cfg_scale', 'gumbel', 'law', 'power', 'top_k', 'top_p', 'r_init', 'sigma_init',
           'layout')                                   # what the images in a folder have in common
SHOWN = 256                                            # most images of a grid
# -----------------------------------------------------------------------------

GIVEN = ()             # the settings that the command line names, and
CHANGED = ()           # those of them that it changes: `configure` writes both


def action(s):
    """What the script does with the settings `s`, a word of USES and of ACTIONS."""
    if s.inception and s.ref and s.ref_from:
        return '--ref_from --inception --ref'
    if s.inception and s.ref and s.metrics:
        return '--metrics --inception --ref'
    if s.sweep:
        return '--sweep'
    if s.metrics:
        return '--metrics'
    if s.layout and s.prompts and (s.png_dir or s.npz):
        return '--layout --prompts, and --png_dir or --npz'
    if s.bench:
        return '--bench'
    return 'drawing'


def in_use(s):
    """Which words of USES count: what is done, with which captions and rewards, by which model."""
    what = action(s)
    words = [what]
    if what.startswith('--ref_from'):                  # which draws nothing
        return words
    words += ['a model', f'--teacher={s.teacher}']
    if what in ('drawing', '--bench'):
        if not s.label:
            words.append('drawing texts')
        elif not s.prompt and not s.prompts:
            words.append('drawing a class')
    if what == '--metrics' and (s.clip_path or s.imagereward_path):
        words.append('--metrics and rewards')
    if what in ('--metrics', '--sweep') and s.imagereward_path:
        words.append('--imagereward_path')
    return words


def load():
    """-> the network with what surrounds it; the stage that made it; its training step; its file;
    the path beside which results are written. A published teacher is read from its files,
    everything else from --ckpt."""
    if teacher != 'ours':
        loaded = load_teacher(teacher, teacher_path, tokenizer_path, data, teacher_heads, run.device, text_path,
                              '' if layout else prompts, teacher_grid, any_prompts=True)
        return loaded, 'model', 0, teacher_path, os.path.join('out', teacher)
    state = load_checkpoint(ckpt, 'model|distill|gan|reward', 'Make one with: python distill.py', fallback=True)
    loaded = unpack(state, run.device, weights, tokenizer_path, ckpt, text_path)
    name_classes(loaded)
    return loaded, state['stage'], state['step'], ckpt, os.path.splitext(ckpt)[0]


def name_classes(loaded):
    """Classes that are only numbered are called as the folders in --data are. Raises ValueError
    where --data is of no use."""
    numbers = [str(k) for k in range(len(loaded.classes))]
    is_numbered = bool(numbers) and loaded.classes == numbers
    measures = sweep or metrics and not inception
    if not data:
        return
    if data in WORLDS or not is_numbered:
        if not measures:
            raise ValueError(f'--data has no effect here: the classes of {ckpt} need no names; it is used with '
                             '--metrics')
        return
    named = list(open_data(data, loaded.tokenizer.config['image_size']).words)
    if len(named) != len(numbers):
        raise ValueError(f'--data={data} has {len(named)} class folders, {ckpt} knows {len(numbers)} classes')
    loaded.words = loaded.classes = named
    loaded.encode = word_encoder(named, loaded.net.config['T'], loaded.device)


def choose_captions(number):
    """The captions to draw: --prompt or the class --label over and over (a name wins over a number,
    as digits are called 0..9), else the lines of --prompts, or as many training captions, spread over
    all of them; for statistics, --npz, classes in random order."""
    if prompts and not prompt:
        return spread(PromptFile(prompts), number)
    if not label and npz and loaded.classes and not prompt:
        return some_classes(number)
    if not label:
        return [prompt] * number if prompt else loaded.examples(number)
    if not loaded.classes:
        raise ValueError('--label needs a model trained on class folders; this one reads captions, '
                         'try --prompt "a red circle"')
    if label in loaded.classes:
        return [label] * number
    if label.isdecimal() and int(label) < len(loaded.classes):
        named = loaded.classes[int(label)]
        if run.rank == 0:
            print(f'note: no class is called {label}; drawn is number {int(label)} of them, from 0, which is {named}')
        return [named] * number
    raise ValueError(f'--label={label!r} is no class of this model; try one of {", ".join(loaded.classes[:40])}')


def some_classes(number):
    """Every class equally often, in random order, as the Inception Score wants it."""
    labels = balanced_labels(number, len(loaded.classes), seed)
    return [loaded.classes[k] for k in labels.tolist()]


def spread(lines, number):
    """As many of the lines, over all of them; each at least once where there is room."""
    return [lines[k * len(lines) // number] for k in range(number)]


def sampler(cfg_scale, gumbel):
    """(cond, rng) -> tokens (B, N), for this checkpoint."""
    one_pass = student_sampler(loaded.net, r_init, sigma_init, tau * tau_sample, top_k, top_p)

    def draw(cond, rng):
        with run.autocast:
            if is_teacher:
                return sample_teacher(loaded.net, cond, n_steps, cfg_scale, gumbel, tau * tau_sample, rng, top_k,
                                      top_p, law, power)
            return one_pass(cond, rng)
    return draw


def check_model():
    """Raise ValueError for a setting that is given and that this kind of model has not."""
    if is_teacher:
        kind, others = 'is a teacher, which draws in steps', GENERATORS_OWN
    else:
        kind, others = 'is a one-step generator', TEACHERS_OWN
    idle = {key: kind for key in others if not (key == 'steps' and steps <= 1)}
    if is_teacher and (law or loaded.net.law) != 'maskbit':
        idle['power'] = 'draws by another law than maskbit'
    if 'kind' not in loaded.tokenizer.pack():          # a published one has a path
        idle['tokenizer_path'] = 'holds its tokenizer'
    if not loaded.encoder:
        idle['text_path'] = 'reads no text by CLIP'
    for key, reason in idle.items():
        if key in GIVEN:
            raise ValueError(f'--{key} has no effect here: {path} {reason}')


def passes(cfg_scale):
    """Network passes of that sampler."""
    return teacher_passes(loaded.net, n_steps, cfg_scale, law, power) if is_teacher else 1


# -----------------------------------------------------------------------------
# What it does: one of six actions

def time_one_batch():
    """Network and decoder apart."""
    captions = choose_captions(batch)
    cond, rngs = loaded.encode(captions), image_rngs(seed, range(batch), run.device)
    draw, size = sampler(cfg_scale, gumbel), loaded.tokenizer.batch
    tokens = draw(cond, rngs)

    def draw_batch():
        draw(cond, rngs)

    def decode_batch():
        for begin in range(0, batch, size):
            loaded.decoder.decode(tokens[begin:begin + size], captions[begin:begin + size])
    decode_batch()
    network = batch / timed(draw_batch, 3, run.device)
    decoder = batch / timed(decode_batch, 3, run.device)
    both = 1 / (1 / network + 1 / decoder)
    print(f'bench: steps {n_steps}, passes {passes(cfg_scale)}, batch {batch}, images_per_s of the network '
          f'{network:.1f}, of the decoder {decoder:.1f}, of both {both:.1f}')


def measure_inception():
    """FID and IS with the network that the user names, precision and recall where the reference has
    images."""
    files = results_files(stem, 'inception', config, CHANGED)
    network, digest = load_inception(inception, run.device, inception_sha256)
    reference = read_reference(ref, network, run.device, batch)
    captions = inception_captions()

    row, features = inception_metrics(sampler(cfg_scale, gumbel), loaded, captions, network, reference, seed, batch)
    report_inception(files, row, len(captions), digest)         # before what may fail
    late = late_metrics(reference.features, features)
    if late:
        report_inception(files, {**row, **late}, len(captions), digest)


def report_inception(files, row, images, digest):
    if run.rank == 0:
        print(', '.join(f'{k} {v:.4g}' for k, v in row.items()) + f' ({images} images, seeds ({seed}, k), '
              f'{passes(cfg_scale)} network pass(es), reference {ref}, Inception {inception} sha256 {digest})')
        write_results(files, dict(row, sha256=digest, images=images, passes=passes(cfg_scale)))


def inception_captions():
    """Classes in random order; for a model that reads text the prompts of a file, as MJHQ-30K's
    meta_data.json."""
    if loaded.classes:
        return some_classes(n_metrics)
    if layout:
        lines = [job.prompt for job in read_jobs(layout, prompts)]
        return spread(lines, min(n_metrics, len(lines)))
    if prompts:
        return spread(PromptFile(prompts), n_metrics)
    raise ValueError('--inception draws classes, or the prompts of a file: give --prompts=FILE, or --layout=mjhq '
                     '--prompts=meta_data.json')


def make_reference():
    """The statistics of a folder of images, cropped and resized as data are, as an npz that --ref
    reads: mu and sigma of all readable ones, and 10,000 of them (arr_0) for precision and
    recall."""
    if not os.path.isdir(ref_from):
        raise ValueError(f'--ref_from={ref_from}: no such folder')
    check_new('ref', ref)
    try_writing(ref)
    network, _ = load_inception(inception, run.device, inception_sha256)
    source = open_data(ref_from, ref_size)
    mean, covariance, readable = folder_moments(source, network, run.device, batch)
    if len(readable) < 2:
        raise ValueError(f'--ref_from={ref_from}: {len(readable)} readable images, a covariance needs 2')
    if run.rank == 0:
        some = np.sort(np.random.RandomState(0).permutation(readable)[:10_000])
        shape = len(some), ref_size, ref_size, 3
        write_npz(ref, shape, folder_pixels(source, some, batch), mu=mean, sigma=covariance)
        print(f'{ref}: mu, sigma of {len(readable)} images of {ref_from} at {ref_size} pixels, arr_0 holds {len(some)} '
              'of them')
        if len(readable) <= len(mean):
            print(f'note: sigma of {len(mean)} features needs more images than that')


def measure_toy():
    """Toy FD, precision, recall and captions followed, at one setting of a sampler or, with
    --sweep, at sixteen."""
    files = results_files(stem, 'sweep' if sweep else 'metrics', config, CHANGED)
    scores = published_scores(globals(), run.device)
    if loaded.data or data:
        source = open_data(data or loaded.data, loaded.tokenizer.config['image_size'], expected=loaded.words)
        reference = Reference(source, load_reader(source, os.path.dirname(stem)), n_reference)
        captions, real = reference.prompts(n_metrics)
    elif scores:
        reference, real, captions = NoReference(loaded), None, choose_captions(n_metrics)
    else:
        raise ValueError('nothing to measure against; give --data=FOLDER, or --inception and --ref, or the files of '
                         'published rewards, as in --clip_path=FOLDER')
    settings = [(cfg_scale, gumbel)]
    if sweep:
        settings = [(s, g) for s in (1.0, 1.5, 2.0, 3.0) for g in (1.0, 2.0, 4.0, 8.0)]
    entries = []
    if real is not None:
        entries.append(dict(name='real images', passes=0, ms=0.0, **reference.measure(real, captions[:len(real)])))
    for s, g in settings:
        images, ms = render(sampler(s, g), loaded, captions, seed, batch)
        name = f'cfg {s:g} gumbel {g:g}' if is_teacher else os.path.basename(path)
        entry = dict(name=name, passes=passes(s), ms=round(ms, 2), **reference.measure(images, captions))
        entry.update(mean_scores(scores, images, captions, run.device))
        entries.append(entry)
        for title in scores:
            print(f'{title}: {entry[title]:.4f} (mean of {len(images)} images of {name})')
        if sweep:
            print(f'{name}: {in_short(entry)}', flush=True)
    show_table(entries)
    print(f'image seeds ({seed}, 0..{n_metrics - 1}), {n_steps} step(s), tau {tau * tau_sample:g}, weights {weights} of '
          f'training step {step}')
    write_results(files, dict(rows=entries))


def write_results(files, results):
    """Numbers, and all settings that they were made with, into each of the files."""
    made = dict(ckpt=path, stage=stage, step=step, steps=n_steps, config=config)
    for name in files:
        with writing(name), open(name, 'w', encoding='utf-8') as file:
            json.dump(dict(results, **made), file, indent=1)
    print(f'-> {files[0]}')


def draw_files(jobs):
    """Write the images of the jobs into a folder as they are drawn, and all of them into an npz if
    asked -> the folder."""
    if npz:
        check_new('npz', npz)
        try_writing(npz)
    folder = png_dir or os.path.splitext(npz)[0]
    made = dict({key: config[key] for key in MADE_BY}, model=os.path.abspath(path), stage=stage, step=step,
                steps=n_steps, tau=tau * tau_sample, tokenizer=loaded.tokenizer.digest(),
                network=hash_of_weights(dict(loaded.net.named_parameters())))
    drawn = draw_folder(sampler(cfg_scale, gumbel), loaded, jobs, folder, made, seed, batch)
    if run.rank == 0:
        of_layout = f' of {layout}' if layout else ''
        print(f'{len(jobs)} images{of_layout}, seeds ({seed}, 0..{len(jobs) - 1}), {passes(cfg_scale)} network pass(es), '
              f'{drawn} of them drawn now -> {folder}')
        if npz:
            pack_folder(folder, jobs, npz)
            print(f'the same images -> {npz}')
    return folder


def draw_benchmark():
    """The images of a benchmark in its layout."""
    draw_files(read_jobs(layout, prompts))


def draw_grid():
    """A grid, and perhaps a PNG per image, of which the grid shows the first."""
    picture = grid or writable(os.path.join(os.path.dirname(stem), 'samples.png'))
    if not is_image(picture):
        raise ValueError(f'--grid={picture}: expected the name of a picture, as in x.png')
    try_writing(picture)
    if n > SHOWN and not (png_dir or npz):
        raise ValueError(f'--n={n} is more than the {SHOWN} images of a grid; write them with --png_dir=FOLDER or '
                         '--npz=FILE')
    captions = choose_captions(n)
    if png_dir or npz:
        jobs = plain_jobs(captions)
        folder = draw_files(jobs)
        if run.rank == 0:
            pixels = np.stack([read_pixels(os.path.join(folder, job.file)) for job in jobs[:SHOWN]])
            save_grid(picture, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, captions)
            print(f'the first {len(pixels)} -> {picture}')
        return
    images, ms = render(sampler(cfg_scale, gumbel), loaded, captions, seed, batch, loaded.decoder)
    save_grid(picture, images, captions)
    print(f'{n} images, seeds ({seed}, 0..{n - 1}), {passes(cfg_scale)} network pass(es), {ms:.1f} ms per image on '
          f'{run.device} -> {picture}')


def handed_on(settings):
    """What a generator's checkpoint says that it was made with."""
    if settings['teacher'] != 'ours':
        return {}
    made = settings_of(settings['ckpt'], (*INHERITED, 'teacher'))
    kind = made.pop('teacher', 'ours')
    if kind in RECIPES:
        made['batch'] = RECIPES[kind]['batch']
    return made


ACTIONS = {
    '--metrics --inception --ref': measure_inception,
    '--metrics': measure_toy,
    '--sweep': measure_toy,
    '--layout --prompts, and --png_dir or --npz': draw_benchmark,
    '--bench': time_one_batch,
    'drawing': draw_grid}


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals(), RECIPES, handed_on)
    what = action(SimpleNamespace(**config))
    run = start_run(half=('cuda',))                    # float32 on a CPU, as in the stages' tables
    if run.world > 1 and not (inception or png_dir or npz):
        raise ValueError('runs as one process, except for --inception, --png_dir and --npz; start it with python')
    if what.startswith('--ref_from'):
        make_reference()
        end_run()
        raise SystemExit
    loaded, stage, step, path, stem = load()
    is_teacher = stage == 'model' and not student
    check_model()
    n_steps = 1
    if is_teacher:
        n_steps = steps or min(16, loaded.net.N)
    if n_steps > loaded.net.N:
        raise ValueError(f'--steps={steps} is more than the {loaded.net.N} tokens of an image; '
                         f'try --steps={loaded.net.N}')
    if what in ('--bench', 'drawing') and not (png_dir or npz):        # what lies in a folder may be measured
        loaded.choose_decoder(run, half_decoder)
    ACTIONS[what]()
    end_run()
