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
      --inception=inception-2015-12-05.pt --ref=VIRTUAL_imagenet256_labeled.npz    # FID, IS; RESULTS.md, section 16: where from
Expected: a grid of 32 images within seconds on 2 CPU cores.
"""
import json
import os
import zipfile

import numpy as np

from common.files import load_checkpoint, settings_of
from common.benchmarks import is_whole, read_jobs, write_image, write_metadata
from common.images import decode_images, open_data, save_grid, word_encoder, write_pngs
from common.metrics import (NoReference, Reference, balanced_labels, in_short, inception_metrics, load_inception,
                            render, show_table)
from common.reader import load_reader
from common.rewards import mean_scores, published_scores
from common.run import configure, end_run, image_rngs, progress, start_run, timed, writing
from common.teachers import load_teacher, unpack
from common.text import PromptFile
from common.world import WORLDS
from model import sample_teacher, student_sampler, teacher_passes

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
weights = 'ema'        # ema (averaged) or net (the last iterate)
grid = ''              # picture to write, '' = samples.png beside the checkpoint
png_dir = ''           # also write every image as a PNG file into this folder
layout = ''            # write the images of a benchmark into png_dir: geneval, hpsv2 or mjhq
metrics = False        # measure n_metrics images instead of drawing a grid
n_metrics = 2000       # images behind each number
n_reference = 5000     # held-out renders that they are compared with (of a folder, at most half)
data = ''              # reference of the metrics: '' = what the checkpoint was trained on, or a folder
inception = ''         # with --metrics: the file inception-2015-12-05.pt gives FID and IS instead of the distances
ref = ''               # its reference, the npz of the ADM suite: mu, sigma, and arr_0 (images) for precision/recall
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
    r_init=(0, 1), sigma_init=(0, 1), tau_sample=1e-6)
# -----------------------------------------------------------------------------

GIVEN = ()             # the settings that the command line names: `configure` writes it


def load():
    """-> the network with what surrounds it; the stage that made it; its training step; its file;
    the path beside which results are written. A published teacher is read from its files,
    everything else from --ckpt."""
    if teacher != 'ours':
        loaded = load_teacher(teacher, teacher_path, tokenizer_path, data, teacher_heads, run.device, text_path,
                              '' if layout else prompts, teacher_grid, any_prompts=True)
        if weights != 'ema':
            raise ValueError(f'{teacher} has one set of weights; leave --weights=ema')
        return loaded, 'model', 0, teacher_path, os.path.join('out', teacher)
    state = load_checkpoint(ckpt, 'model|distill|gan|reward', 'Make one with: python distill.py', fallback=True)
    loaded = unpack(state, run.device, weights, tokenizer_path, ckpt, text_path)
    name_classes(loaded)
    return loaded, state['stage'], state['step'], ckpt, os.path.splitext(ckpt)[0]


def name_classes(loaded):
    """Classes that are only numbered are called as the folders in --data are."""
    numbers = [str(k) for k in range(len(loaded.classes))]
    if numbers and data and data not in WORLDS and loaded.classes == numbers:
        named = list(open_data(data, loaded.tokenizer.config['image_size']).words)
        if len(named) == len(numbers):
            loaded.words = loaded.classes = named
            loaded.encode = word_encoder(named, loaded.net.config['T'], loaded.device)


def choose_captions(number):
    """The captions to draw: --prompt or the class --label over and over (a name wins over a number,
    as digits are called 0..9), or as many training captions, spread over all of them."""
    if prompts and not prompt:
        return spread(PromptFile(prompts), number)
    if not label:
        return [prompt] * number if prompt else loaded.examples(number)
    if not loaded.classes:
        raise ValueError('--label needs a model trained on class folders; this one reads captions, '
                         'try --prompt "a red circle"')
    if label in loaded.classes:
        return [label] * number
    if label.isdecimal() and int(label) < len(loaded.classes):
        return [loaded.classes[int(label)]] * number
    raise ValueError(f'--label={label!r} is no class of this model; try one of {", ".join(loaded.classes[:40])}')


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


def passes(cfg_scale):
    """Network passes of that sampler."""
    return teacher_passes(loaded.net, n_steps, cfg_scale, law, power) if is_teacher else 1


# -----------------------------------------------------------------------------
# What it does: one of four actions

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
            loaded.tokenizer.decode(tokens[begin:begin + size], captions[begin:begin + size])
    decode_batch()
    network = batch / timed(draw_batch, 3, run.device)
    decoder = batch / timed(decode_batch, 3, run.device)
    both = 1 / (1 / network + 1 / decoder)
    print(f'bench: steps {n_steps}, passes {passes(cfg_scale)}, batch {batch}, images_per_s of the network '
          f'{network:.1f}, of the decoder {decoder:.1f}, of both {both:.1f}')


def measure_inception():
    """FID and IS with the network that the user names, precision and recall where the reference has
    images."""
    network, digest = load_inception(inception, run.device)
    reference = open_reference(ref)
    captions = inception_captions()
    row = inception_metrics(sampler(cfg_scale, gumbel), loaded, captions, network, reference, seed, batch)
    if run.rank == 0:
        print(', '.join(f'{k} {v:.4g}' for k, v in row.items()) + f' ({len(captions)} images, seeds ({seed}, k), '
              f'{passes(cfg_scale)} network pass(es), reference {ref}, Inception {inception} sha256 {digest})')
        if 'arr_0' not in reference:
            print(f'no precision and recall: {ref} holds no images (arr_0)')
        write_json(f'{stem}-inception.json', dict(row, ckpt=path, step=step, seed=seed, ref=ref, sha256=digest))


def inception_captions():
    """Classes in random order; for a model that reads text the prompts of a file, as MJHQ-30K's
    meta_data.json."""
    if loaded.classes:
        labels = balanced_labels(n_metrics, len(loaded.classes), seed)
        return [loaded.classes[k] for k in labels.tolist()]
    if layout:
        lines = [job.prompt for job in read_jobs(layout, prompts)]
        return spread(lines, min(n_metrics, len(lines)))
    if prompts:
        return spread(PromptFile(prompts), n_metrics)
    raise ValueError('--inception draws classes, or the prompts of a file: give --prompts=FILE, or --layout=mjhq '
                     '--prompts=meta_data.json')


def open_reference(path):
    """The npz of the ADM suite. Raises ValueError."""
    try:
        reference = np.load(path)
        reference['mu'], reference['sigma']
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f'--ref={path}: {type(error).__name__}; expected an npz with mu and sigma, as the ADM suite '
                         'publishes (assets/RESULTS.md, section 16)') from None
    return reference


def measure_toy():
    """Toy FD, precision, recall and captions followed, at one setting of a sampler or, with
    --sweep, at sixteen."""
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
        entries.append(dict(name='real images', passes=0, ms=0.0, **reference.measure(real, captions)))
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
    name = f'{stem}-{"sweep" if sweep else "metrics"}'
    if seed:
        name += f'-{seed}'
    write_json(f'{name}.json', dict(ckpt=path, step=step, seed=seed, rows=entries))


def draw_benchmark():
    """The images of a benchmark in its layout, a seed per prompt and image; what is there and whole
    is skipped."""
    jobs = read_jobs(layout, prompts)
    same_images()
    missing = [job for job in jobs if not is_whole(os.path.join(png_dir, job.file))]
    draw, bar = sampler(cfg_scale, gumbel), progress(len(missing), layout)
    for begin in range(0, len(missing), batch):
        some = missing[begin:begin + batch]
        captions = [job.prompt for job in some]
        tokens = draw(loaded.encode(captions), image_rngs(seed, [job.k for job in some], run.device))
        images = decode_images(loaded.tokenizer, tokens, captions)
        for job, image in zip(some, images):
            if job.metadata:
                write_metadata(png_dir, job)
            write_image(image, os.path.join(png_dir, job.file))
        bar.update(len(some))
    bar.close()
    print(f'{len(jobs)} images of {layout}, {len(missing)} of them drawn now, seeds ({seed}, 0..{len(jobs) - 1}) -> '
          f'{png_dir}')


def same_images():
    """A folder holds the images of one model and one sampler, as a file beside it says, so that
    images of another are never judged for this one. Raises ValueError."""
    about = png_dir.rstrip('/') + '.json'
    made = dict(model=os.path.abspath(path), stage=stage, step=step, weights=weights, seed=seed, steps=n_steps,
                cfg_scale=cfg_scale, gumbel=gumbel, tau=tau * tau_sample, layout=layout)
    if os.path.exists(about):
        with open(about) as file:
            before = json.load(file)
        for key, value in made.items():
            if before.get(key) != value:
                raise ValueError(f'--png_dir={png_dir} holds images of {key} {before.get(key)}, not {value} ({about}); '
                                 'give these a folder of their own')
        return
    write_json(about, made)


def draw_grid():
    """A grid, and perhaps a PNG per image."""
    captions = choose_captions(n)
    images, ms = render(sampler(cfg_scale, gumbel), loaded, captions, seed, batch)
    picture = grid or os.path.join(os.path.dirname(stem), 'samples.png')
    save_grid(picture, images, captions)
    written = picture
    if png_dir:
        write_pngs(png_dir, images, captions)
        written += f' and {png_dir}/'
    print(f'{n} images, seeds ({seed}, 0..{n - 1}), {passes(cfg_scale)} network pass(es), {ms:.1f} ms per image on '
          f'{run.device} -> {written}')


def write_json(path, content):
    with writing(path), open(path, 'w') as file:
        json.dump(content, file, indent=1)
    print(f'-> {path}')


def handed_on(settings):
    """What a generator's checkpoint says that it was made with."""
    if settings['teacher'] != 'ours':
        return {}
    made = settings_of(settings['ckpt'], (*INHERITED, 'teacher'))
    kind = made.pop('teacher', 'ours')
    if kind in RECIPES:
        made['batch'] = RECIPES[kind]['batch']
    return made


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals(), RECIPES, handed_on)
    run = start_run(half=('cuda',))                    # float32 on a CPU, as in the stages' tables
    if run.world > 1 and not (metrics and inception):
        raise ValueError('runs as one process, except for --metrics --inception=...; start it with python')
    if (inception or ref) and (sweep or not metrics):
        raise ValueError('--inception and --ref go with --metrics, and not with --sweep')
    if bool(inception) != bool(ref):
        raise ValueError('--inception and --ref go together: a network and the statistics made with it')
    if (metrics or sweep) and (prompt or label or png_dir):
        raise ValueError('--metrics and --sweep use captions of the data and write no images; leave out --prompt, '
                         '--label and --png_dir')
    if layout and not (prompts and (png_dir or inception)):
        raise ValueError(f'--layout={layout} needs --prompts, the file or folder of the benchmark, and --png_dir, where '
                         'its images go')
    if layout and (prompt or label or bench):
        raise ValueError(f'--layout={layout} draws the prompts of its file; leave out --prompt, --label and --bench')
    if prompts and label:
        raise ValueError('--prompts and --label are two ways to say what is drawn; leave one out')
    loaded, stage, step, path, stem = load()
    is_teacher = stage == 'model' and not student
    if not is_teacher and ('steps' in GIVEN and steps > 1 or sweep):
        raise ValueError(f'{path}: is a one-step generator; --steps and --sweep are for a teacher, as in out/model.pt')
    n_steps = 1
    if is_teacher:
        n_steps = steps or min(16, loaded.net.N)
    if n_steps > loaded.net.N:
        raise ValueError(f'--steps={steps} is more than the {loaded.net.N} tokens of an image; '
                         f'try --steps={loaded.net.N}')
    if bench:
        time_one_batch()
    elif metrics and inception:
        measure_inception()
    elif layout:
        draw_benchmark()
    elif metrics or sweep:
        measure_toy()
    else:
        draw_grid()
    end_run()
