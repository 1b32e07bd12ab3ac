"""
Data, as a user has it: published files as the hubs have them (safetensors, shards, half precision, files that lie),
and folders of images, with classes or captions. test_all.py runs these too.
"""
import contextlib
import json
import os
import struct
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import SkipTest, mock

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, PngImagePlugin

from common import images as I
from common import reader
from common.metrics import Reference
from common.published import SAFETENSORS, drop_pages, fill, mapped_ranges, read_published
from common.teachers import load_teacher
from common.testing import (HERE, UNTRAINED, capture, exits_with, golden, must_run, printed, rng, same,
                            save_safetensors, shard, small_tokenizer, write_safetensors)
from model import MDM
from tokenizer import Tokenizer

CPU = torch.device('cpu')


# -----------------------------------------------------------------------------
# Published files

def every_type():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for letters, dtype in SAFETENSORS.items():
        values = torch.randint(0, 2, (3, 5), generator=generator)
        state[f'some.{letters}'] = values.to(dtype)
        state[f'none.{letters}'] = torch.empty(0, 3, dtype=dtype)
        state[f'one.{letters}'] = torch.ones((), dtype=dtype)
    state['real'] = torch.randn(7, 2, 3, generator=generator)
    return state


def test_safetensors_of_every_type_are_read_bit_for_bit(tmp_path):
    state = every_type()
    save_safetensors(state, tmp_path / 'own.safetensors')
    same(read_published(tmp_path / 'own.safetensors')[0], state)
    only_empty = {'nothing': torch.empty(0, 4)}
    save_safetensors(only_empty, tmp_path / 'empty.safetensors')
    same(read_published(tmp_path / 'empty.safetensors')[0], only_empty)
    odd = {'a': torch.ones(3, dtype=torch.uint8), 'b': torch.randn(4)}    # b at an odd address
    save_safetensors(odd, tmp_path / 'odd.safetensors')
    same(read_published(tmp_path / 'odd.safetensors')[0], odd)
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise SkipTest('safetensors is not installed, so only our own writer was read') from None
    save_file(state, tmp_path / 'theirs.safetensors', {'format': 'pt'})
    same(read_published(tmp_path / 'theirs.safetensors')[0], state)


def test_a_cut_or_lying_safetensors_file_is_one_line_that_names_it(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_safetensors(every_type(), path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 50, len(whole) // 3, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        with exits_with(path, 'Download it again'):
            read_published(path)
    path.write_bytes(whole + b'more')
    with exits_with(path, 'the last 4 bytes'):
        read_published(path)
    path.write_bytes((2 ** 63).to_bytes(8, 'little') + whole[8:])
    with exits_with(path, 'cut off, or no safetensors file'):
        read_published(path)
    path.write_text('<html>not found, and more of it</html>')
    with exits_with(path, 'no safetensors file'):
        read_published(path)
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n')
    with exits_with(path, 'git lfs pull'):
        read_published(path)
    good = dict(dtype='F32', shape=[2], data_offsets=[0, 8])
    for change in (dict(shape=[3]), dict(shape=[-1, -2]), dict(shape=[2.0]), dict(shape='2'), dict(shape=5),
                   dict(shape=[2 ** 70, 0], data_offsets=[0, 0]), dict(data_offsets=[0, 9]),
                   dict(data_offsets=[0]), dict(data_offsets=[0, 4, 8]), dict(data_offsets=[8, 16]),
                   dict(data_offsets=[-8, 0]), dict(data_offsets=[4, -4]), dict(data_offsets=[0, 2 ** 80]),
                   dict(data_offsets=None), dict(dtype=['F32']), dict(dtype='F8_E4M3'), dict(dtype=3)):
        write_safetensors(path, json.dumps({'w': {**good, **change}}).encode(), bytes(8))
        with exits_with(path, 'w'):
            read_published(path)
    for header in (b'', b'[]', b'3', b'{"w": 3}', b'{"w": {}}', b'{"w": []}', b'{', b'\xff\xfe{}', b'[' * 100_000,
                   b'{"__metadata__": {}}'):
        write_safetensors(path, header)
        with exits_with(path):
            read_published(path)
    both = {'a': good, 'b': good}                                    # two tensors in the same bytes
    write_safetensors(path, json.dumps(both).encode(), bytes(8))
    with exits_with(path, 'b should be bytes 0 to 8', 'begin at 8'):
        read_published(path)
    for sizes in ([0, 2 ** 47, 2 ** 47], [2 ** 47, 2 ** 47, 0]):     # overflow of the strides
        write_safetensors(path, json.dumps({'w': {**good, 'shape': sizes, 'data_offsets': [0, 0]}}).encode())
        with exits_with(path, 'w'):
            read_published(path)


def test_a_folder_gives_full_precision_then_safetensors_then_a_usual_name(tmp_path):
    def put(*names):
        for name in names:
            state = {'w': torch.ones(2) * len(name)}
            if name.endswith('.safetensors'):
                save_safetensors(state, tmp_path / name)
            else:
                torch.save(state, tmp_path / name)

    def chosen():
        return os.path.basename(read_published(tmp_path)[1])
    put('net.fp16.safetensors')
    assert chosen() == 'net.fp16.safetensors'                        # better than nothing
    put('net.bf16.bin')
    assert chosen() == 'net.fp16.safetensors'
    put('net.bin')
    assert chosen() == 'net.bin'
    put('net.safetensors')
    assert chosen() == 'net.safetensors'
    put('other.safetensors')
    with exits_with(tmp_path, 'holds 2 weight files', 'net.safetensors', 'other.safetensors',
                    'name the file'):
        chosen()
    put('diffusion_pytorch_model.fp16.safetensors', 'optimizer.pt')
    (tmp_path / 'config.json').write_text('{}')
    with exits_with('name the file'):
        chosen()
    put('diffusion_pytorch_model.safetensors')
    assert chosen() == 'diffusion_pytorch_model.safetensors'
    assert os.path.basename(read_published(tmp_path / 'net.bin')[1]) == 'net.bin'      # a file is a file


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(tmp_path):
    state = {f'w{k}': torch.randn(3, k + 1) for k in range(5)}
    for stem, ending, save in (('model', 'safetensors', save_safetensors),
                               ('diffusion_pytorch_model', 'safetensors', save_safetensors),
                               ('pytorch_model', 'bin', torch.save)):
        folder = tmp_path / stem
        folder.mkdir()
        index = shard(state, folder, stem, ending, save)
        shard({k: v.half() for k, v in state.items()}, folder, stem, ending, save, half='.fp16')
        for source in (folder, index):
            found, name = read_published(source)
            same(found, state)
            assert name == str(index)
        lost = folder / f'{stem}-00002-of-00002.{ending}'
        lost.rename(folder / 'away')
        with exits_with(index, f'lists {lost.name}, which is missing'):
            read_published(folder)
        save({'w1': state['w1']}, lost)                              # of another release
        with exits_with(index, 'w3 should be in', lost.name):
            read_published(folder)
        lost.write_bytes(b'cut')
        with exits_with(lost):
            read_published(folder)
        index.unlink()
        (folder / f'{stem}.{ending}.index.fp16.json').unlink()
        with exits_with(folder, 'no index', '00001-of-00002', lost.name):
            read_published(folder)
        save({key: state[key] for key in sorted(state)[1::2]}, lost)
        for source in (folder, lost):                                # all of them, without the index
            same(read_published(source)[0], state)
        lost.unlink()
        with exits_with('no index', f'{lost.name} is missing'):
            read_published(folder)
        (folder / lost.name.replace('00002-of', '00001-of')).unlink()
        for name in folder.glob('*fp16*00001-of*'):
            name.unlink()
        with exits_with(folder, 'the first of them', 'index'):
            read_published(folder)
    for text in ('', '[]', '{}', '{"weight_map": 3}', '{"weight_map": {"w": 3}}',
                 '{"weight_map": {"w": null, "v": "a"}}',
                 '{"weight_map": {"w": "../x.bin"}}', '{"weight_map": {"w": "/etc/passwd"}}', '[' * 100_000,
                 '{"weight_map": {"w": "model.safetensors.index.json"}}'):
        index = tmp_path / 'model.safetensors.index.json'
        index.write_text(text)
        with exits_with(index, 'weight_map'):
            read_published(index)
    index.write_text('{"weight_map": {}}')
    with exits_with(index, 'no tensors'):
        read_published(index)


def test_the_right_sub_folder_of_a_release_is_named(tmp_path):
    for name in ('transformer', 'vqvae', 'scheduler'):
        (tmp_path / name).mkdir()
    (tmp_path / 'scheduler' / 'scheduler_config.json').write_text('{}')
    with exits_with(tmp_path, 'no weight files'):
        read_published(tmp_path, 'vqvae')
    save_safetensors({'w': torch.ones(1)}, tmp_path / 'transformer' / 'diffusion_pytorch_model.safetensors')
    save_safetensors({'w': torch.ones(1)}, tmp_path / 'vqvae' / 'diffusion_pytorch_model.safetensors')
    with exits_with(f'name {tmp_path}/vqvae'):
        read_published(tmp_path, 'vqvae')
    with exits_with('transformer, vqvae', f'such as {tmp_path}/transformer'):
        read_published(tmp_path)
    with exits_with(f'{tmp_path}/nowhere: no such file'):
        read_published(f'{tmp_path}/nowhere')


class Callback:
    """A foreign class, as a Lightning checkpoint carries one."""

    def __init__(self):
        self.best = torch.ones(2)


class Deadly:
    """Would leave a file if anything in a checkpoint were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    state = {'w': torch.randn(3)}
    torch.save(dict(epoch=1, callbacks={Callback: Callback()}, state_dict=state), tmp_path / 'last.ckpt')
    same(read_published(tmp_path / 'last.ckpt')[0], state)
    torch.save(dict(state_dict=state, more=Deadly(str(tmp_path / 'done'))), tmp_path / 'deadly.bin')
    with contextlib.suppress(ValueError):
        read_published(tmp_path / 'deadly.bin')
    assert not (tmp_path / 'done').exists()
    (tmp_path / 'text.bin').write_text('<html>')
    with exits_with('text.bin', 'not a weight file'):
        read_published(tmp_path / 'text.bin')
    program = torch.jit.trace(nn.Linear(3, 4), torch.ones(1, 3))
    program.save(tmp_path / 'program.pt')
    with exits_with('program.pt', 'TorchScript', 'state dict'):
        read_published(tmp_path / 'program.pt')
    sparse = {'w': torch.ones(3), 's': torch.eye(3).to_sparse()}
    torch.save(sparse, tmp_path / 'sparse.pt')
    assert list(read_published(tmp_path / 'sparse.pt')[0]) == ['w']


def published_ones():
    """[(kind, load(source) -> network, state dict as published)] of MaskGIT and MaskBit in small."""
    found = []
    for kind, name in (('maskgit', 'maskgit_transformer'), ('maskbit', 'maskbit_generator')):
        file = golden(name)
        state = file.get('state_dict') or file['checkpoint']['model_state_dict']

        def load(source, kind=kind):
            return MDM.from_pretrained(kind, source, n_head=4)
        found.append((f'{kind} transformer', load, state))
    for kind, name, grid in (('maskgit', 'taming_vqgan', 4), ('maskbit', 'maskbit_tokenizer', 8)):
        file = golden(name)
        state = file.get('state_dict') or file['checkpoint']['state_dict']

        def load_tokenizer(source, kind=kind, grid=grid):
            return Tokenizer.from_pretrained(kind, source, grid)
        found.append((f'{kind} tokenizer', load_tokenizer, state))
    return found


def test_maskgit_and_maskbit_load_from_every_form_of_file(tmp_path):
    for kind, load, state in published_ones():
        folder = tmp_path / kind.replace(' ', '_')
        folder.mkdir()
        state = {key: value.clone() for key, value in state.items()}
        wanted = load(state).state_dict()
        save_safetensors(state, folder / 'whole.safetensors')
        torch.save(state, folder / 'whole.bin')
        for source in (folder / 'whole.safetensors', folder / 'whole.bin', folder):
            same(load(source).state_dict(), wanted)
        (folder / 'shards').mkdir()
        shard(state, folder / 'shards', 'model', 'safetensors', save_safetensors)
        same(load(folder / 'shards').state_dict(), wanted)
        for dtype in (torch.float16, torch.bfloat16):
            cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
            save_safetensors(cast, folder / 'half.safetensors')
            torch.save(cast, folder / 'half.pt')
            wide = {key: value.float() if value.is_floating_point() else value for key, value in cast.items()}
            for source in ('half.safetensors', 'half.pt'):
                same(load(folder / source).state_dict(), load(wide).state_dict())
        key = next(key for key in state if key.endswith('conv_in.weight') or key == 'pos_emb')
        save_safetensors({k: v for k, v in state.items() if k != key}, folder / 'lacks.safetensors')
        with exits_with('lacks.safetensors', key, 'expected', 'missing'):
            load(folder / 'lacks.safetensors')
        with exits_with('sub-folders do', 'name one'):
            load(folder.parent / 'maskgit_transformer' / '..')


class Wide(nn.Module):
    """17 MB a layer in float32."""

    def __init__(self, n_layers):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1024, 4096) for _ in range(n_layers)])


def same_name(key):
    return key


def memory(entry):
    """VmRSS is what is held now, VmHWM the most since the start of this process, in bytes. ru_maxrss is the latter,
    too, but counts the process that started this one."""
    with open('/proc/self/status') as file:
        for line in file:
            if line.startswith(entry):
                return int(line.split()[1]) * 1024


def peak_while_loading(path, n_layers):
    """Run in a process of its own: prints the peak of memory while a file is loaded, in weights."""
    with torch.device('meta'):
        network = Wide(n_layers)
    before = memory('VmRSS')
    weights, name = read_published(path)
    fill(network, weights, same_name, name)
    size = sum(value.nbytes for value in network.state_dict().values())
    print((memory('VmHWM') - before) / size)


def test_loading_needs_less_than_a_fifth_more_memory_than_the_weights(tmp_path):
    if not os.path.exists('/proc/self/maps'):
        raise SkipTest('pages of a mapped file are given back on Linux only')

    def check(name, n_layers):
        command = f'from common import test_data; test_data.peak_while_loading({str(tmp_path / name)!r}, {n_layers})'
        out = subprocess.run([sys.executable, '-c', command], cwd=HERE, capture_output=True, text=True, check=True)
        assert 0.9 < float(out.stdout) < 1.2, (name, out.stdout)

    def weights(n_layers):
        with torch.device('meta'):
            network = Wide(n_layers)
        return {key: torch.full(value.shape, 0.5) for key, value in network.state_dict().items()}
    save_safetensors(weights(24), tmp_path / 'wide.safetensors')     # 400 MB
    check('wide.safetensors', 24)
    state = weights(12)
    save_safetensors({key: value.half() for key, value in state.items()}, tmp_path / 'half.safetensors')
    torch.save(dict(state_dict=state, optimizer=[torch.zeros(10, 1024, 1024)]), tmp_path / 'wide.ckpt')
    (tmp_path / 'shards').mkdir()
    shard(state, tmp_path / 'shards', 'model', 'safetensors', save_safetensors)
    for name in ('half.safetensors', 'wide.ckpt', 'shards'):
        check(name, 12)


def test_only_mapped_tensors_are_taken_out_of_memory_and_they_come_back(tmp_path):
    state = {'w': torch.randn(300, 1000), 'v': torch.randn(5)}
    save_safetensors(state, tmp_path / 'x.safetensors')
    torch.save(state, tmp_path / 'x.pt')
    torch.save(state, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    for name in ('x.safetensors', 'x.pt', 'old.pt'):
        found, _ = read_published(tmp_path / name)
        for value in (*found.values(), *found['w'].chunk(3), found['w'].T):
            drop_pages(value)
        same(found, state)
        assert bool(mapped_ranges(tmp_path / name)) == (name != 'old.pt' and os.path.exists('/proc/self/maps'))
    given, _ = read_published(state)
    before = {key: value.clone() for key, value in given.items()}
    for value in given.values():
        drop_pages(value)                                            # not of a file: must be left alone
    same(given, before)


# -----------------------------------------------------------------------------
# Captioned folders

COLORS = {'red': (220, 20, 20), 'green': (20, 200, 20), 'blue': (20, 20, 220)}


def picture(path, color='red'):
    """A 16x16 picture of one colour; the name of the file makes it a little different."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.full((16, 16, 3), COLORS[color], np.uint8)
    pixels[sum(path.encode()) % 16, 3] = 255
    Image.fromarray(pixels).save(path)


def captioned(folder, n=12, category=True):
    """A folder with metadata.csv: n images in three colours; the caption of each has a number of its
    own, which no other has. -> its lines"""
    lines = ['file_name,text,category' if category else 'file_name,text']
    for k in range(n):
        color = list(COLORS)[k % 3]
        picture(f'{folder}/{k:02d}.png', color)
        line = f'{k:02d}.png,"A {color} square, number-{k}!"'
        lines.append(line + f',{color}' if category else line)
    write(f'{folder}/metadata.csv', '\n'.join(lines))
    return lines


def write(path, text):
    with open(path, 'wb') as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def quiet(call, *arguments):
    """The result of a call, its notes unprinted."""
    with capture():
        return call(*arguments)


def opened(folder, expected=None):
    """The source, its notes unprinted."""
    return quiet(I.open_data, str(folder), 16, 50_000, expected)


def refuses(folder, *words):
    """open_data raises an error of one line that contains all `words`."""
    with exits_with(*words):
        opened(folder)


def test_three_layouts_of_captions_read_the_same(tmp_path):
    for k in range(8):
        picture(f'{tmp_path}/sub/{k}.png', 'blue')
        write(f'{tmp_path}/sub/{k}.txt', f'\ufeff a  blue\nsquare,\t{k}\n')
    wanted = [f'a blue square, {k}' for k in range(8)]
    rows = [dict(file_name=f'sub/{k}.png', text=f'a blue square, {k}') for k in range(8)]

    source = opened(tmp_path)
    assert type(source) is I.CaptionedFolder and source.captions(range(8)) == wanted
    write(f'{tmp_path}/metadata.jsonl', '\n\n'.join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert source.batch([3, 1])[1] == [wanted[3], wanted[1]]
    os.remove(f'{tmp_path}/metadata.jsonl')
    lines = [f'./sub/{k}.png,"a blue\r\nsquare, {k}"' for k in range(8)]
    write(f'{tmp_path}/metadata.csv', '\ufefffile_name,text\r\n' + '\r\n'.join(lines))
    source = opened(tmp_path)
    assert source.captions(range(8)) == wanted
    images, captions = source.batch(range(8))
    assert images.shape == (8, 3, 16, 16) and images[0, 2].mean() > images[0, 0].mean()


def test_class_folders_without_captions_stay_class_folders(tmp_path):
    for k in range(10):
        picture(f'{tmp_path}/{"red" if k < 5 else "blue"}/{k}.png')
    write(f'{tmp_path}/red/notes.txt', 'no caption: no image has this name')
    source = opened(tmp_path)
    assert type(source) is I.Folder and source.words == ('blue', 'red')
    assert [source.label_of(word) for word in source.words] == [0, 1]
    assert source.captions([0, 9]) == source.batch([0, 9])[1] == ['blue', 'red']


def test_rare_words_become_one_word_and_prompts_may_hold_new_ones(tmp_path):
    captioned(tmp_path)
    write(f'{tmp_path}/other.png', b'')
    text = printed(I.open_data, str(tmp_path), 16)
    assert '12 captions, from metadata.csv, of up to 5 words' in text
    assert '12 captions hold rare words, 12 in' in text
    assert '1 images' in text and 'other.png' in text

    source = opened(tmp_path)
    assert source.words == ('a', 'blue', 'green', 'number', 'red', 'square', I.UNKNOWN)
    assert source.caption_length == 5 and source.captions([1]) == ['A green square, number-1!']
    ids = I.word_ids(['A green square, number-1!', 'red'], source.words, 5)
    assert ids.tolist() == [[0, 2, 5, 3, 6], [4, 7, 7, 7, 7]]
    again = I.captions_of(ids, source.words)
    assert again == [f'a green square number {I.UNKNOWN}', 'red']
    assert torch.equal(I.word_ids(again, source.words, 5), ids)

    new = ['a sqare zeppelin', 'a red a red a red']
    text = printed(I.word_ids, new, source.words, 5)
    assert "'sqare'" in text and 'nearest known: square' in text and '(and 1 others)' in text
    assert "only the first 5 words are read of 'a red a red a red'" in text
    assert printed(I.word_ids, new, source.words, 5) == ''        # said once
    text = printed(I.word_ids, ['a bleu square'], source.words, 5)
    assert "'bleu'" in text and 'nearest known: blue' in text


def test_words_of_other_scripts_keep_their_accents():
    assert I.plain_words("Cafe\u0301 – L'été, 2x (हिन्दी)…") == ['café', 'l', 'été', '2x', 'हिन्दी']
    assert I.plain_words(f'a {I.UNKNOWN}, !') == ['a', 'unknown']
    assert I.plain_words(f'a {I.UNKNOWN} cat') == ['a', I.UNKNOWN, 'cat']


def test_long_captions_are_cut_and_a_note_says_so(tmp_path):
    lines = captioned(tmp_path)
    long = ' '.join(f'w{k}' for k in range(40))
    for k in (2, 3):
        lines[k] = f'{k - 1:02d}.png,{long},red'
    write(f'{tmp_path}/metadata.csv', '\n'.join(lines))
    notes = printed(I.open_data, str(tmp_path), 16)
    assert '1 captions have more than 32 words and are cut' in notes
    source = opened(tmp_path)
    assert source.caption_length == 32 and 'w31' in source.words and 'w32' not in source.words
    assert source.captions([2]) == [long]
    assert I.word_ids([long], source.words, 32).max() < len(source.words)


def test_vocabulary_is_bounded_to_the_commonest_words():
    assert I.MOST_WORDS + 2 < 2 ** 15                          # ids are stored in 16 bits
    with mock.patch.object(I, 'MOST_WORDS', 3):
        words = I.make_vocabulary(['d c b a', 'd c b a', 'd c', 'e'])[0]
    assert words == ('a', 'c', 'd', I.UNKNOWN)


def test_problems_of_captions_are_one_line(tmp_path):
    good = captioned(f'{tmp_path}/a')
    table = f'{tmp_path}/a/metadata.csv'

    def with_line(k, line):
        lines = [*good]
        lines[k] = line
        write(table, '\n'.join(lines))

    for line, words in (
            ('file_name,caption,category', ('line 1', 'no column text', 'found file_name, caption')),
            ('file;text', ('no column file_name and no column text', 'found file;text'))):
        with_line(0, line)
        refuses(f'{tmp_path}/a', 'metadata.csv', *words)
    for line, words in (
            ('gone.png,a,b', ('1 of 12 images are listed and not there', 'gone.png')),
            ('02.png,a,b', ('02.png is listed 2 times',)),
            ('./02.png,a,b', ('02.png is listed 2 times',)),
            ('01.png,,b', ('01.png has an empty caption',)),
            ('01.png', ('01.png has an empty caption',)),
            (',a,b', ('line 3', 'file_name is empty')),
            ('01.png,"!?",b', ('without letter or digit',)),
            ('01.png,a,', ('1 of 12 images have no category', '01.png')),
            ('01.png,a, cat,b', ('line 3', 'a caption with a comma needs quotes')),
            ('01.png,"a,b', ('metadata.csv, line', 'is a quote missing'))):
        with_line(2, line)
        refuses(f'{tmp_path}/a', *words)
    with_line(-1, '11.png,"a blue square,blue')
    refuses(f'{tmp_path}/a', 'unexpected end of data')
    write(table, '\n'.join(good).encode() + b'\n\xff')
    refuses(f'{tmp_path}/a', 'line 14', 'not UTF-8')
    write(table, good[0])
    refuses(f'{tmp_path}/a', 'lists no image')
    write(table, '')
    refuses(f'{tmp_path}/a', 'lists no image')
    write(table, '\n'.join(good[:4]))
    refuses(f'{tmp_path}/a', '3 captioned images', 'at least 8')
    write(f'{tmp_path}/a/metadata.jsonl', '')
    refuses(f'{tmp_path}/a', 'both metadata.jsonl and metadata.csv')
    os.remove(table)
    for text, words in (('{"file_name": "00.png", "text": "a"}\n{"file', ('line 2', 'not JSON')),
                        ('\n[1]', ('line 2', 'a JSON list')),
                        ('{"file_name": "00.png"}', ('line 1', 'no column text', 'found file_name')),
                        ('{"file_name": "00.png", "text": null}', ('empty caption',)),
                        ('{"file_name": "00.png", "text": 7}', ('line 1', 'text is 7'))):
        write(f'{tmp_path}/a/metadata.jsonl', text)
        refuses(f'{tmp_path}/a', *words)
    refuses(tmp_path, 'a/metadata.jsonl', f'give --data={tmp_path}/a')
    os.remove(f'{tmp_path}/a/metadata.jsonl')
    for k in range(11):
        write(f'{tmp_path}/a/{k:02d}.txt', 'a cat')
        if k < 5:                                              # fewer than half have one: classes
            assert quiet(I.open_data, f'{tmp_path}/a', 16).words == ('image',)
        else:
            refuses(f'{tmp_path}/a', f'{11 - k} of 12 images have no .txt', f'{k + 1:02d}.png')


def test_tars_are_to_be_unpacked(tmp_path):
    for k in range(3):
        write(f'{tmp_path}/{k:05d}.tar', b'')
        write(f'{tmp_path}/{k:05d}.parquet', b'')
    refuses(tmp_path, '3 tars', '00000.tar', f'cd {tmp_path} && for t in *.tar')
    for k in range(8):
        picture(f'{tmp_path}/{k}.png')
        write(f'{tmp_path}/{k}.txt', f'picture {k}')
    assert opened(tmp_path).length == 8


def test_token_cache_follows_the_captions_and_gives_them_back(tmp_path):
    lines = captioned(f'{tmp_path}/data')
    write(f'{tmp_path}/data/04.png', b'no image')
    tokenizer = small_tokenizer()

    def encoded(flips=False):
        source = opened(f'{tmp_path}/data')
        return source, quiet(I.token_data, source, tokenizer, tmp_path, CPU, 5, flips)

    source, dataset = encoded()
    assert dataset.shape == (11, 16 + 5) and dataset.dtype == np.int8
    assert np.array_equal(encoded()[1], dataset)
    assert len([name for name in os.listdir(tmp_path) if name.startswith('tokens-')]) == 1
    for flips in (False, True):
        source, dataset = encoded(flips)
        data = I.TokenData(dataset, 16, source)
        captions = data.captions_at(np.arange(len(data)))
        assert len(set(captions)) == 11
        assert len(captions) == (22 if flips else 11)
        assert captions[-1] == 'A blue square, number-11!'
        ids = I.word_ids(captions, source.words, source.caption_length)
        assert np.array_equal(ids, dataset[:, 16:])            # encode(captions) gives what is stored

    run = SimpleNamespace(micro=6, device=CPU)
    rows = data.draw_rows(run, rng(3))
    tokens, ids = data.read(rows, CPU)
    same(data.draw_ids(run, rng(3)), (tokens, ids))
    drawn, captions = data.draw(run, rng(3))
    assert torch.equal(drawn, tokens) and len(rows) == 6
    assert torch.equal(I.word_ids(captions, source.words, 5), ids)

    lines[1] = lines[1].replace('red', 'blue')
    write(f'{tmp_path}/data/metadata.csv', '\n'.join(lines))
    assert encoded()[1][0, 17] != dataset[0, 17]
    os.remove(I.numbers_path(dataset.filename))
    with exits_with('delete that file too'):
        data.images_of(rows)


def test_wrong_captions_are_of_another_category_and_read_otherwise(tmp_path):
    captioned(f'{tmp_path}/a')
    source = opened(f'{tmp_path}/a')
    color = {caption: caption.split()[1] for caption in source.captions(range(12))}
    for caption in color:
        wrong = [source.wrong_caption(caption, [u]) for u in np.linspace(0, 0.999, 40)]
        assert {color[other] for other in wrong} == set(COLORS) - {color[caption]}
        assert len(set(wrong)) == 8
    captioned(f'{tmp_path}/b', category=False)
    source = opened(f'{tmp_path}/b')
    wrong = {source.wrong_caption('A red square, number-0!', [u]) for u in np.linspace(0, 0.999, 40)}
    assert len(wrong) == 8 and all('red' not in other for other in wrong)  # these read the same
    assert len({source.label_of(caption) for caption in color}) == 12
    for folder in 'ab':
        for k in range(12):
            picture(f'{tmp_path}/{folder}/{k:02d}.png')
        lines = [f'{k:02d}.png,number-{k},x' for k in range(12)]
        write(f'{tmp_path}/{folder}/metadata.csv', '\n'.join(['file_name,text,category', *lines]))
        source = opened(f'{tmp_path}/{folder}')
        with exits_with('nothing to follow'):
            source.wrong_caption('number-1', [0.5])


def test_neighbours_vote_on_the_category_and_halves_share_no_image(tmp_path):
    captioned(tmp_path, 60)
    source = opened(tmp_path)
    index, others, name = source.reference_split(100)
    assert sorted([*index, *others]) == list(range(60)) and '30 images' in name
    reference = Reference(source, UNTRAINED, 100)
    captions, images = reference.prompts(30)
    row = reference.measure(images, captions)
    assert row['accuracy'] == 1 and row['n'] == 30
    other = [source.wrong_caption(caption, [0.3]) for caption in captions]
    assert reference.measure(images, other)['accuracy'] == 0
    with exits_with('no image has the caption'):
        source.label_of('a zebra')


def test_the_reader_of_a_folder_learns_its_classes_or_the_words_of_its_captions(tmp_path):
    captioned(f'{tmp_path}/words', 24)
    source = opened(f'{tmp_path}/words')
    index = source.reader_examples(99)
    assert sorted(index) == list(range(24))
    facts = source.facts(index)                                # commonest first: a, number, square; then colours
    assert facts.shape == (24, 6) and facts[:, :3].all()
    assert (facts[:, 3:].argmax(1) == [('blue', 'green', 'red').index(list(COLORS)[k % 3]) for k in index]).all()
    for k in range(24):
        picture(f'{tmp_path}/classes/{k % 3}/{k}.png', list(COLORS)[k % 3])
    write(f'{tmp_path}/classes/1/x.png', 'no image')
    classes = opened(f'{tmp_path}/classes')
    with mock.patch.multiple(reader, STEPS=60, BATCH=8, RATE=1e-2):
        with capture():
            images, learned = reader.examples(classes)
            net = reader.train_reader(classes)
        assert len(images) == 24 and learned.shape == (24, 3)  # the bad file is left out
        guessed = net(images)[:, :-1].argmax(1)
        assert (guessed == learned.argmax(1)).double().mean() > 0.9
        assert reader.examples(source)[1].shape == (24, 3)     # what all captions say is not learned


def test_a_captioned_folder_has_every_member_of_a_source(tmp_path):
    captioned(tmp_path)
    source = opened(tmp_path)
    for name in ('data size words caption_length length limit batch captions bad is_bad key examples '
                 'training_examples test_examples reader_examples facts reference_split wrong_caption task_names tasks '
                 'judges follows label_of factors').split():
        assert hasattr(source, name), name
    assert not source.judges and source.task_names == () and source.factors(None, []) == {}
    assert json.dumps(source.key()) and source.limit == source.length == 12
    assert list(source.tasks(['a', 'b'])) == ['', '']
    for indices in (source.examples(5), source.training_examples(5), source.test_examples(20)):
        assert min(indices) == 0 and max(indices) == 11
    words = opened(tmp_path, source.words).words
    assert words == source.words


def test_tokenizer_and_teacher_train_on_captions_and_take_new_words(tmp_path):
    captioned(f'{tmp_path}/data', 24)
    small = {'tokenizer.py': ['--image_size=16', '--ch=4', '--ch_mult=1,1,2', '--n_codes=12'],
             'model.py': ['--D=16', '--depth=1', '--n_head=1']}
    for script, settings in small.items():
        text = must_run(script, f'--data={tmp_path}/data', '--steps=4', f'--out_dir={tmp_path}/out', *settings)
        assert '24 captions, from metadata.csv, of up to 5 words' in text
    loaded = load_teacher('ours', f'{tmp_path}/out/model.pt')
    source = opened(f'{tmp_path}/data')
    assert loaded.words == list(source.words) and loaded.net.config['T'] == 5
    assert loaded.prompts[1] == f'a green square number {I.UNKNOWN}' and len(loaded.prompts) == 24
    assert torch.equal(loaded.encode(loaded.prompts), loaded.encode(source.captions(range(24))))
    assert 'elephant' in printed(loaded.encode, ['a red elephant'])


# -----------------------------------------------------------------------------
# What a data folder holds

def noise(path, k, size=16):
    """A picture that no other k has."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.RandomState(k).randint(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def two_classes(root, n=6):
    """A folder of n cats and n dogs -> its path."""
    for k in range(n):
        noise(f'{root}/cat/{k}.png', k)
        noise(f'{root}/dog/{k}.JPEG', 100 + k)
    return str(root)


def names_of(source):
    """The files of a source, as names below its folder."""
    return [os.path.relpath(path, source.root) for path, caption in source.files]


def test_one_rule_says_which_files_are_images_and_counts_the_others(tmp_path):
    data = two_classes(tmp_path / 'data')
    wanted = names_of(opened(data))
    assert len(wanted) == 12
    for name in ('cat/0.json', 'dog/Thumbs.db', 'notes/a.txt', 'dog/noending'):
        write_in(f'{data}/{name}', 'x')
    for name in ('cat/.ipynb_checkpoints/0.png', 'dog/@eaDir/a/0.png', '__MACOSX/0.png', 'cat/._0.png',
                 '.git/0.png'):
        noise(f'{data}/{name}', 50)
    for k in range(9):
        write_in(f'{data}/labels/{k}.png', 'no image')         # not one of them is
    noise(f'{data}/loose.png', 51)
    noise(f'{data}/old/deep/tokenizer.png', 52)                # an earlier run, and this one
    write_in(f'{data}/old/deep/tokenizer.log.jsonl', '')
    noise(f'{data}/out/png/0.png', 53)
    noise(f'{data}/drawn/00000.png', 54)                       # by sample.py, as the file beside it says
    write_in(f'{data}/drawn.json', json.dumps(dict(model='x.pt', network='a', prompts='b')))
    os.mkfifo(f'{data}/dog/pipe.png')
    for target, link in (('..', 'dog/loop'), ('/', 'dog/all'), ('../dog', 'cat/dogs'), (data, 'cat/self'),
                         ('../cat/0.png', 'dog/cat.png'), ('nowhere.png', 'dog/dead.png')):
        os.symlink(target, f'{data}/{link}')
    text = printed(I.open_data, data, 16, out_dir=f'{data}/out')
    source = quiet(I.open_data, data, 16, 50_000, None, f'{data}/out')
    assert names_of(source) == wanted and source.words == ('cat', 'dog')
    assert text.count('\n') == 1
    for reason in ('5 not images by their ending (.json, .db, ', '1 folder where runs write (drawn)', '5 hidden', '1 no plain files',
                   '5 links to what is there already', '1 dead links', '1 outside the class folders',
                   '9 in labels (no image is readable)', '1 folder where runs write (old/deep)',
                   '1 folder where runs write (out)'):
        assert reason in text, (reason, text)

    noise(f'{tmp_path}/elsewhere/.hidden/deep/0.png', 54)      # hidden, but not below the folder
    os.symlink(f'{tmp_path}/elsewhere/.hidden', f'{data}/bird')
    os.symlink(f'{tmp_path}/elsewhere/.hidden/deep', f'{data}/cat/bird')
    os.symlink('deep', f'{tmp_path}/elsewhere/.hidden/again')
    assert names_of(opened(data, ('dog', 'cat'))) == wanted[6:] + wanted[:6]    # the model knows two
    assert printed(I.open_data, data, 16, expected=('cat', 'dog')) == ''
    source = quiet(I.open_data, data, 16, 50_000, None, f'{data}/out')
    assert names_of(source) == ['bird/deep/0.png', *wanted]
    with exits_with('the model knows 3'):
        opened(data, ('cat', 'dog', 'cow'))


def write_in(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write(path, text)


def test_captioned_folders_are_listed_by_the_same_rule(tmp_path):
    for layout in ('lists', 'texts'):
        data = f'{tmp_path}/{layout}'
        lines = ['file_name,text']
        for k in range(9):
            name = f'{k}.png' if k < 8 else '.cache/8.png'
            noise(f'{data}/{name}', k)
            lines.append(f'{name},picture {k}')
            write(f'{data}/{name[:-4]}.txt', f'picture {k}')
        noise(f'{data}/out/model.png', 20)
        write(f'{data}/out/model.log.jsonl', '')
        os.symlink('0.png', f'{data}/link.png')
        if layout == 'lists':
            write(f'{data}/metadata.csv', '\n'.join(lines))
        text = printed(I.open_data, data, 16)
        source = opened(data)
        assert source.captions(range(source.length)) == [f'picture {k}' for k in range(8)]
        assert 'hidden' in text and 'where runs write (out)' in text and 'links to what' in text
        assert ('1 listed in metadata.csv and no images' in text) == (layout == 'lists')
        assert printed(I.open_data, data, 16, expected=source.words) == ''


def test_notes_say_what_was_taken_for_classes_and_for_the_world(tmp_path):
    for names, noted in ((('train', 'val'), True), (('Test', 'train2017'), True),
                         (('train', 'bus'), False)):
        for k, name in enumerate(names * 4):
            noise(f'{tmp_path}/{"".join(names)}/{name}/{k}.png', k)
        text = printed(I.open_data, f'{tmp_path}/{"".join(names)}', 16)
        assert (f'--data={tmp_path}/{"".join(names)}/{sorted(names)[0]}' in text) == noted, text
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert printed(I.open_data, 'shapes', 32) == ''
        os.mkdir('shapes')
        assert '--data=./shapes' in printed(I.open_data, 'shapes', 32)
    finally:
        os.chdir(before)


def test_classes_are_decided_once_and_a_run_is_no_part_of_its_data(tmp_path):
    data = two_classes(tmp_path, 8)
    for k in range(3):
        write_in(f'{data}/labels/{k}.png', 'no image')
    small = {'tokenizer.py': ['--image_size=16', '--ch=4', '--ch_mult=1,1,2', '--n_codes=12'],
             'model.py': ['--D=16', '--depth=1', '--n_head=1'],
             'distill.py': ['--n_eval=8', '--n_reference=8', '--teacher_steps=2']}
    for script, settings in small.items():
        text = must_run(script, f'--data={data}', f'--out_dir={data}/out', '--steps=4', *settings)
        assert text.count('3 in labels (no image is readable)') == (script != 'distill.py')
        assert 'skipped' not in text
    state = torch.load(f'{data}/out/distill.pt')
    assert state['words'] == ['cat', 'dog'] and len(state['prompts']) == 16


def test_halves_share_no_image_and_count_none_twice_where_files_are_unreadable(tmp_path):
    data = two_classes(tmp_path, 30)
    for k in range(0, 30, 3):
        write(f'{data}/cat/{k}.png', 'no image')
        write(f'{data}/dog/{k}.JPEG', 'no image')
    source = opened(data)
    with capture():
        reference = Reference(source, UNTRAINED, 100)
        captions, images = reference.prompts(15)
        again, once = reference.prompts(100)
    index, others, name = source.reference_split(100)
    seen = {path for path in source.bad}
    assert all(source.files[i][0] not in seen for i in (*index, *source.readable(others, 100)))
    assert len(reference.captions) == len(index) == len(set(index))
    assert f'{len(index)} images of' in name and not set(index) & set(others)
    assert len({image.numpy().tobytes() for image in images}) == 15 == len(captions)
    assert len(again) == 100                                   # over again, the images not
    assert len(once) == len({image.numpy().tobytes() for image in once}) == len(source.readable(others, 100))
    assert again[:len(once)] == again[len(once):2 * len(once)]
    half = source.batch(index)[0]
    assert not {x.numpy().tobytes() for x in half} & {x.numpy().tobytes() for x in images}
    assert len(index) + len(source.readable(others, 100)) == 40


# -----------------------------------------------------------------------------
# Pixels

def test_metadata_never_cost_an_image(tmp_path):
    def exif(*entries):
        """A block of EXIF from (tag, type, count, value)."""
        packed = b''.join(struct.pack('<HHII', *entry) for entry in entries)
        return b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + packed + bytes(4)
    turn = (0x0112, 3, 1, 6)
    blocks = [b'bad', b'Exif\0\0bad', exif(turn)[:20], exif((0x0112, 2, 4, 0x303030)), exif((0x0112, 3, 1, 99)),
              exif(turn), exif(turn, (0x8769, 4, 1, 2 ** 24)), exif(turn, (0x8769, 2, 4, 2 ** 24))]
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8))
    upright = np.asarray(image)
    for k, block in enumerate(blocks):
        for ending, options in (('png', {}), ('webp', dict(lossless=True))):
            path = f'{tmp_path}/{k}.{ending}'
            image.save(path, exif=block, **options)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                seen = I.read_image(path, 16)
            assert np.array_equal(seen, np.rot90(upright, -1) if k > 4 else upright), path
    for compression in (None, 'tiff_lzw'):
        for kind in (2, 4):                                    # text, or nothing there
            path = f'{tmp_path}/a.tif'
            image.save(path, compression=compression, tiffinfo={0x8769: 2 ** 24, 0x0112: 6})
            with open(path, 'rb') as file:
                content = file.read()
            entry = struct.pack('<HHI', 0x8769, 4, 1)
            assert entry in content
            write(path, content.replace(entry, struct.pack('<HHI', 0x8769, kind, 1)))
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                seen = I.read_image(path, 16)
            assert np.array_equal(seen, np.rot90(upright, -1)), (compression, kind)
    content = content[:60] + b'\xff' * 40 + content[100:]         # pixels that LZW cannot read
    write(path, content)
    with exits_with('decoder error'):
        I.read_image(path, 16)
    text = PngImagePlugin.PngInfo()
    text.add_text('workflow', 'x' * 3_000_000, zip=True)
    image.save(f'{tmp_path}/text.png', pnginfo=text)
    assert np.array_equal(I.read_image(f'{tmp_path}/text.png', 16), upright)


def test_one_value_is_white_in_all_images_of_a_data_set(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for k, (top, white, dtype) in enumerate((
            (1, 1, np.float32), (1.002, 1, np.float32), (0.9, 1, np.float32), (255, 255, np.float32),
            (4000, 4095, np.float32), (65535, 65535, np.float32), (255, 255, np.int32), (1000, 255, np.int32),
            (4095, 4095, np.int32), (60000, 65535, np.int32))):
        for j in range(8):                                     # of falling brightness
            os.makedirs(f'{tmp_path}/{k}', exist_ok=True)
            Image.fromarray((ramp * top / 2 ** j).astype(dtype)).save(f'{tmp_path}/{k}/{j}.tif')
        text = printed(I.open_data, f'{tmp_path}/{k}', 16)
        assert f'from 0, black, to {white}, white' in text
        images, _ = opened(f'{tmp_path}/{k}').batch(range(8))
        for j in range(8):
            wanted = (ramp * top / 2 ** j).astype(dtype) * (2 / white) - 1
            assert abs(images[j, 0].numpy() - wanted.clip(-1, 1)).max() < 0.011, (top, j)
    for bad in (np.nan, np.inf):
        ramp[3, 3] = bad
        Image.fromarray(ramp).save(f'{tmp_path}/0/3.tif')
        source = opened(f'{tmp_path}/0')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            quiet(source.batch, range(8))
        assert ['no finite numbers' in reason for reason in source.bad.values()] == [True]


# -----------------------------------------------------------------------------
# Mirror images, and the token cache

def test_captions_of_mirror_images_are_mirrored(tmp_path):
    shapes = I.open_data('shapes', 32, 600)
    images, captions = shapes.batch(range(600))
    related = [k for k, caption in enumerate(captions) if 'left' in caption or 'right' in caption]
    mirrored = [shapes.mirrored(caption) for caption in captions]
    assert len(related) > 30 and shapes.follows(images.flip(-1), mirrored).all()
    assert not shapes.follows(images.flip(-1), captions)[related].any()
    for caption, other in (('Left of it, a RIGHT-handed man', 'Right of it, a LEFT-handed man'),
                           ('bright, cleft', 'bright, cleft'), ('the leftmost_right', 'the rightmost_left')):
        assert I.mirrored(caption) == other and I.mirrored(other) == caption

    data = f'{tmp_path}/data'
    lines = ['file_name,text']
    for k in range(12):
        noise(f'{data}/{k:02d}.png', k)
        lines.append(f'{k:02d}.png,a cat {("left", "right", "above")[k % 3]} of a dog')
    write(f'{data}/metadata.csv', '\n'.join(lines))
    source = opened(data)
    with capture() as text:
        table = I.token_data(source, small_tokenizer(), tmp_path, CPU, 5, True)
    assert "exchanged in the captions of 8 mirror images, such as 'a cat left of" in text.getvalue()
    tokens = I.TokenData(table, 16, source)
    captions = tokens.captions_at(np.arange(24))
    assert captions[:6] == [f'a cat {side} of a dog' for side in ('left', 'right', 'right', 'left', 'above', 'above')]
    assert np.array_equal(I.word_ids(captions, source.words, source.caption_length), table[:, 16:])
    for k in range(8):
        noise(f'{tmp_path}/arrows/{("left", "right", "right turn")[k % 3]}/{k}.png', k)
    arrows = opened(f'{tmp_path}/arrows')
    assert [arrows.mirrored(word) for word in arrows.words] == ['right', 'left', 'right turn']


def test_a_moved_or_touched_folder_is_not_encoded_again_and_a_changed_one_is(tmp_path):
    data = two_classes(tmp_path / 'data')
    noise(f'{data}/cat/large.png', 9, 300)
    noise(f'{data}/cat/plain.bmp', 9, 300)
    tokenizer = small_tokenizer()
    key = opened(data).key()
    path = I.cache_path(opened(data), tokenizer, tmp_path, False)
    for folder, _, names in os.walk(data):
        for name in names:
            os.utime(f'{folder}/{name}', (1, 1))
    os.rename(data, f'{tmp_path}/moved')
    assert opened(f'{tmp_path}/moved').key() == key == json.loads(json.dumps(key))
    assert I.cache_path(opened(f'{tmp_path}/moved'), tokenizer, tmp_path, False) == path

    def changed(name, change):
        """The key with one file's bytes changed; size and times stay."""
        with open(f'{tmp_path}/moved/{name}', 'rb') as file:
            content = file.read()
        write(f'{tmp_path}/moved/{name}', change(content))
        os.utime(f'{tmp_path}/moved/{name}', (1, 1))
        other = opened(f'{tmp_path}/moved').key()
        write(f'{tmp_path}/moved/{name}', content)
        return other

    def one_pixel(content):
        middle = len(content) // 2 + 5000
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]

    def other_end(content):
        return content[:-20] + bytes(8) + content[-12:]        # of a PNG, its check sum

    assert changed('cat/plain.bmp', one_pixel) != key
    assert changed('cat/large.png', other_end) != key
    assert opened(f'{tmp_path}/moved').key() == key
    os.rename(f'{tmp_path}/moved/cat/0.png', f'{tmp_path}/moved/cat/swap')
    os.rename(f'{tmp_path}/moved/cat/1.png', f'{tmp_path}/moved/cat/0.png')
    os.rename(f'{tmp_path}/moved/cat/swap', f'{tmp_path}/moved/cat/1.png')
    source = opened(f'{tmp_path}/moved')
    assert source.key() != key
    write(path, 'an old one')
    with capture() as text:
        I.token_data(source, tokenizer, tmp_path, CPU)
    assert '1 token caches of other images' in text.getvalue() and os.path.basename(path) in text.getvalue()


def test_an_empty_token_table_takes_its_room_and_its_integers_hold_every_class(tmp_path):
    for n, dtype in ((128, np.int8), (129, np.int16), (32_768, np.int16), (32_769, np.int32)):
        assert I.id_type(n) == dtype and np.iinfo(dtype).max >= n - 1
    source = SimpleNamespace(words=range(40_000), caption_length=1, length=30_000)
    tokenizer = SimpleNamespace(V=12, N=16)
    path = f'{tmp_path}/tokens.npy'
    I.create_table(source, tokenizer, path, False)
    table = np.load(f'{path}.partial', mmap_mode='r')
    assert table.dtype == np.int32 and table.shape == (30_000, 18) and not table.any()
    status = os.stat(f'{path}.partial')
    assert status.st_blocks * 512 >= status.st_size            # no holes, which a full disk could not fill
    os.remove(f'{path}.partial')
    with mock.patch.object(I, 'reserve', side_effect=OSError('No space left')), exits_with('No space left'):
        I.create_table(source, tokenizer, path, False)
    assert os.listdir(tmp_path) == []
