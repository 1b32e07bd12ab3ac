"""
Folders of drawn images: plain ones, and the layouts of three text-to-image benchmarks, which prompts they draw and
where they look for images. The judges (GenEval's detector, HPSv2, FID of MJHQ-30K, the ADM suite) run in environments
of their own; sample.py draws for them.
"""
import json
import os
import zipfile
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from common.files import digest_of
from common.images import decode_images, one_line, read_text
from common.run import (image_rngs, meet, progress, rank_and_world, replacing, sum_over_processes,
                        writing)

LAYOUTS = ('geneval', 'hpsv2', 'mjhq')
PER_PROMPT = 4                         # images of a prompt in GenEval


def read_jobs(layout, path):
    """The images of a benchmark -> list of jobs: prompt, k (its number in the seeds), file (where
    the image belongs, in the folder of the benchmark), and for GenEval metadata (a dict). Raises
    ValueError, FileNotFoundError."""
    if not os.path.exists(path):
        raise FileNotFoundError(f'--prompts={path}: no such file; expected {EXPECTED[layout]}')
    if layout == 'hpsv2':
        return hpsv2_jobs(path)
    if not os.path.isfile(path):
        raise ValueError(f'--prompts={path}: is a folder; expected the file {EXPECTED[layout]}')
    if layout == 'geneval':
        return geneval_jobs(path)
    return mjhq_jobs(path)


EXPECTED = {'geneval': 'evaluation_metadata.jsonl',
            'hpsv2': 'the folder of anime.json, concept-art.json, paintings.json, photo.json',
            'mjhq': 'meta_data.json'}


def geneval_jobs(path):
    """evaluation_metadata.jsonl: an object with "prompt" a line -> 00000/samples/0000.png to
    0003.png each."""
    jobs = []
    lines = [line for line in read_text(path).split('\n') if line.strip()]
    for number, line in enumerate(lines):
        metadata = parse(line, path, number + 1)
        prompt = prompt_of(metadata, path, number + 1)
        for j in range(PER_PROMPT):
            jobs.append(SimpleNamespace(prompt=prompt, k=PER_PROMPT * number + j, metadata=metadata,
                                        file=f'{number:05d}/samples/{j:04d}.png'))
    return checked(jobs, path, 'geneval')


def hpsv2_jobs(path):
    """A folder of STYLE.json, a list of prompts each -> STYLE/00000.jpg; the protocol stores
    JPEG."""
    if not os.path.isdir(path):
        raise ValueError(f'--prompts={path}: is no folder; expected {EXPECTED["hpsv2"]}')
    jobs = []
    for name in sorted(os.listdir(path)):
        if not name.endswith('.json'):
            continue
        file = os.path.join(path, name)
        prompts = parse(read_text(file), file, 1)
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f'{file}: expected a list of prompts')
        for number, prompt in enumerate(prompts):
            jobs.append(SimpleNamespace(prompt=prompt, k=len(jobs), metadata=None,
                                        file=f'{name[:-len(".json")]}/{number:05d}.jpg'))
    return checked(jobs, path, 'hpsv2')


def mjhq_jobs(path):
    """meta_data.json: {id: {"category", "prompt"}} -> CATEGORY/ID.png."""
    listed = parse(read_text(path), path, 1)
    if not isinstance(listed, dict):
        raise ValueError(f'{path}: expected an object of images by their ids, as in MJHQ-30K')
    jobs = []
    for name, entry in listed.items():
        prompt = prompt_of(entry, path, len(jobs) + 1)
        category = str(entry.get('category', 'all'))
        for part in (category, name):
            if os.path.basename(part) != part or part in ('', '.', '..'):
                raise ValueError(f'{path}: {part!r} is no name of a file')
        jobs.append(SimpleNamespace(prompt=prompt, k=len(jobs), metadata=None, file=f'{category}/{name}.png'))
    return checked(jobs, path, 'mjhq')


def plain_jobs(captions):
    """An image a caption -> 00000.png, 00001.png, ..."""
    jobs = []
    for k, caption in enumerate(captions):
        jobs.append(SimpleNamespace(prompt=caption, k=k, metadata=None, file=f'{k:05d}.png'))
    return jobs


def parse(text, path, number):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}, line {number}: not JSON ({error})') from None


def prompt_of(entry, path, number):
    if not isinstance(entry, dict) or not isinstance(entry.get('prompt'), str):
        raise ValueError(f'{path}, entry {number}: expected an object with "prompt", got {str(entry)[:60]}')
    prompt = one_line(entry['prompt'])
    if not prompt:
        raise ValueError(f'{path}, entry {number}: the prompt is empty')
    return prompt


def checked(jobs, path, layout):
    if not jobs:
        raise ValueError(f'--prompts={path}: no prompts in it; expected {EXPECTED[layout]}')
    return jobs


# -----------------------------------------------------------------------------
# A folder holds the images of one model and one sampler, as FOLDER.json beside it says

@torch.no_grad()
def draw_folder(draw, loaded, jobs, folder, made, seed, batch):
    """Draw the images of the jobs with draw(cond, rngs) -> tokens into a folder, each written at
    once; what is there and whole is skipped, so that an interrupted call can be repeated. Processes
    take batches in turn. `made` says what the images have in common -> how many were drawn now.
    Raises ValueError, OSError."""
    rank, world = rank_and_world()
    made = dict(made, seed=seed, n=len(jobs), prompts=digest_of([[job.file, job.prompt] for job in jobs]))
    check_folder(folder, made, jobs)
    meet()                                             # all have looked before one writes
    if rank == 0:
        mark_folder(folder, made, jobs)
    drawn, bar = 0, progress(len(jobs), 'images')
    for begin in range(rank * batch, len(jobs), world * batch):
        some = jobs[begin:begin + batch]
        missing = [job for job in some if not is_whole(os.path.join(folder, job.file))]
        if missing:
            draw_batch(draw, loaded, missing, folder, seed)
        drawn += len(missing)
        bar.update(min(world * batch, len(jobs) - begin))
    bar.close()
    drawn = torch.tensor(drawn, device=loaded.device)
    sum_over_processes(drawn)                          # waits for all
    return int(drawn)


def draw_batch(draw, loaded, jobs, folder, seed):
    captions = [job.prompt for job in jobs]
    tokens = draw(loaded.encode(captions), image_rngs(seed, [job.k for job in jobs], loaded.device))
    images = decode_images(loaded.decoder, tokens, captions)
    for job, image in zip(jobs, images):
        if job.metadata is not None:
            write_metadata(folder, job)
        write_image(image, os.path.join(folder, job.file))


def check_folder(folder, made, jobs):
    """Raise ValueError where a folder holds images that were made otherwise than `made` says, so
    that they are never judged for these; or, without such a file, anything that drawing would
    replace."""
    about = about_file(folder)
    if not os.path.exists(about):
        names = ['captions.txt', *(job.file for job in jobs)]
        names += [metadata_file(job) for job in jobs if job.metadata is not None]
        for name in names:
            path = os.path.join(folder, name)
            if os.path.lexists(path):
                raise ValueError(f'{path}: is there and was not drawn here (there is no {about}); choose another '
                                 '--png_dir')
        return
    before = parse(read_text(about), about, 1)
    if not isinstance(before, dict) or 'model' not in before:
        raise ValueError(f'{about}: does not say what {folder} holds; choose another --png_dir')
    for key, value in made.items():
        if before.get(key) != value:
            raise ValueError(f'{folder}: holds images of {key} {before.get(key)}, not {value} ({about}); give these '
                             'a folder of their own with --png_dir')


def mark_folder(folder, made, jobs):
    """Write FOLDER.json and, in a folder of no layout, captions.txt with a line per image."""
    write_text(about_file(folder), json.dumps(made, indent=1))
    if not made['layout']:
        lines = [f'{job.file}\t{one_line(job.prompt)}\n' for job in jobs]
        write_text(os.path.join(folder, 'captions.txt'), ''.join(lines))


def about_file(folder):
    return os.path.abspath(folder) + '.json'


LAST_BYTES = {'.png': b'IEND\xaeB`\x82', '.jpg': b'\xff\xd9'}    # PIL reads a PNG without its end, too


def is_whole(path):
    """Is the image there, from first to last byte?"""
    try:
        with Image.open(path) as image:
            image.load()
        with open(path, 'rb') as file:
            content = file.read()
    except (OSError, SyntaxError):                     # PIL's word for a broken PNG
        return False
    return content.endswith(LAST_BYTES[os.path.splitext(path)[1]])


def write_image(image, path):
    """Image (3, H, W) in [-1, 1] -> PNG or JPEG. Its temporary name is the same in each run: what one
    that was killed leaves is used up by the next."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    temporary = f'{path}.tmp'
    with writing(path):
        Image.fromarray(pixels).save(temporary, format='JPEG' if path.endswith('.jpg') else 'PNG')
        os.replace(temporary, path)


def write_metadata(folder, job):
    """GenEval's metadata.jsonl beside the samples of a prompt: exactly one JSON object."""
    write_text(os.path.join(folder, metadata_file(job)), json.dumps(job.metadata))


def metadata_file(job):
    return os.path.join(os.path.dirname(os.path.dirname(job.file)), 'metadata.jsonl')


def write_text(path, text):
    with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        file.write(text)


def read_pixels(path):
    """An image that was drawn here -> uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.array(image)


# -----------------------------------------------------------------------------
# All images in one npz

def pack_folder(folder, jobs, path):
    """The images of a folder as arr_0 of an npz, uint8 (M, H, W, 3), as the ADM suite wants
    them."""
    files = [os.path.join(folder, job.file) for job in jobs]
    pixels = (read_pixels(file)[None] for file in files)
    write_npz(path, (len(files), *read_pixels(files[0]).shape), pixels)


def write_npz(path, shape, parts, **arrays):
    """What np.savez writes, without all images in memory: arr_0, uint8 of that shape, from parts
    (m, H, W, 3), and other arrays."""
    header = dict(descr='|u1', fortran_order=False, shape=tuple(shape))
    with replacing(path) as temporary:
        with zipfile.ZipFile(temporary, 'w') as archive:       # stored, not deflated
            with archive.open('arr_0.npy', 'w', force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(part.tobytes())
            for name, array in arrays.items():
                with archive.open(f'{name}.npy', 'w', force_zip64=True) as file:
                    np.lib.format.write_array(file, array)


def check_new(setting, path):
    """Raise ValueError where a file is there already, or its name is no npz's."""
    if not path.endswith('.npz'):
        raise ValueError(f'--{setting}={path}: expected a name that ends in .npz')
    if os.path.lexists(path):
        raise ValueError(f'--{setting}={path}: is there already, and is not replaced; delete it or choose another name')
