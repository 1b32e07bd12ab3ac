"""
The layouts of three text-to-image benchmarks: which prompts they draw and where they look for images. The judges
(GenEval's detector, HPSv2, FID of MJHQ-30K) run in environments of their own; sample.py draws for them.
"""
import json
import os
from types import SimpleNamespace

import torch
from PIL import Image

from common.images import one_line, read_text
from common.run import writing

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
    """Image (3, H, W) in [-1, 1] -> PNG or JPEG: temporary name, then renamed, so that what is
    there is whole."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    temporary = f'{path}.{os.getpid()}.tmp'
    with writing(path):
        Image.fromarray(pixels).save(temporary, format='JPEG' if path.endswith('.jpg') else 'PNG')
        os.replace(temporary, path)


def write_metadata(folder, job):
    """GenEval's metadata.jsonl beside the samples of a prompt: exactly one JSON object."""
    path = os.path.join(folder, os.path.dirname(os.path.dirname(job.file)), 'metadata.jsonl')
    temporary = f'{path}.{os.getpid()}.tmp'
    with writing(path):
        with open(temporary, 'w', encoding='utf-8') as file:
            json.dump(job.metadata, file)
        os.replace(temporary, path)
