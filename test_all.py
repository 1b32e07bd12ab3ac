"""
The claims of this repository, as tests: plain functions, on a CPU (one needs a GPU), with tiny networks, in a few
minutes.

$ python test_all.py                 # all of them, ends with "N passed, M failed, K skipped"
$ python test_all.py resume soft     # those with one of these words in their name
$ pytest test_all.py                 # the same, if you have pytest
Set GOLDEN to a folder of golden files to compare with published layouts; such tests skip where it is unset.
"""
import ast
import contextlib
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from unittest import SkipTest, mock

import numpy as np
import scipy.linalg
import scipy.stats

GPUS = {k: os.environ[k] for k in ('CUDA_VISIBLE_DEVICES',) if k in os.environ}
os.environ['CUDA_VISIBLE_DEVICES'] = ''                # before torch looks: one test alone is for a GPU
import torch
import torch.nn.functional as F
from PIL import Image

torch.set_num_threads(1)                               # two workers share two cores, and they fork

import distill
import gan
import model as M
import reward
import sample
import tokenizer as T
import tteo

HERE = os.path.dirname(os.path.abspath(__file__))
OFTEN = ['--batch_size=8', '--save_every=4', '--log_every=2']
TINY = {'tokenizer.py': ['--ch=8', '--ch_mult=1,1,2', '--n_codes=32', '--steps=12', '--warmup_free=4'],
        'model.py': ['--D=32', '--depth=2', '--n_head=2', '--steps=8', '--n_images=256'],
        'distill.py': ['--steps=12', '--n_eval=40', '--n_reference=200', '--teacher_steps=3'],
        'gan.py': ['--steps=12', '--n_eval=40', '--n_reference=200', '--teacher_steps=3', '--disc_warmup=2',
                   '--spectral'],
        'reward.py': ['--steps=8', '--n_eval=20', '--n_reference=100', '--teacher_steps=2', '--reward_steps=3',
                      '--reward_batch=16', '--patience=9']}
INPUTS = {'tokenizer.py': [], 'model.py': ['tokenizer.pt'], 'distill.py': ['tokenizer.pt', 'model.pt'],
          'gan.py': ['model.pt', 'distill.pt', 'tokens-*.npy'], 'reward.py': ['model.pt', 'distill.pt', 'rewards.pt']}
ALONE = dict(os.environ, OMP_NUM_THREADS='1')
KILL = """
import os, signal, torch
real, left = {call}, [{nth}]
def deadly(*args, **options):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **options)
{call} = deadly
"""
PRECISION = """
import torch
can = dict(getattr(torch.cpu, 'get_capabilities', dict)(), avx512_bf16={})                # True: bf16, False: float32
torch.cpu.get_capabilities = lambda: can
"""
TRACED = """
import torch
def compile(module):
    module._compiled_call_impl = torch.compile(module._call_impl, backend='aot_eager')
torch.nn.Module.compile = compile
"""
ON_GPU = f"import os\ndel os.environ['CUDA_VISIBLE_DEVICES']\nos.environ.update({GPUS})\n"
FULL = 'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n'      # no file beyond 2 kB

def forked(command, before, output):
    """What a new python would do with `command`, in a process that has imported torch already."""
    os.dup2(output, 1), os.dup2(output, 2), os.chdir(HERE), os.environ.update(ALONE)
    sys.stdout, sys.stderr = (open(n, 'w', buffering=1, closefd=False) for n in (1, 2))
    sys.argv = command
    exec(before, {})
    try:
        runpy.run_path(command[0], None, '__main__')
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())
        sys.exit(1)

def run(script, *arguments, processes=1, before=''):
    """Run a script with its tiny settings -> (exit code, output). `before`: lines of Python to run first."""
    command = [os.path.join(HERE, script), *(TINY[script] + OFTEN if script in TINY else []), *arguments]
    if processes == 1 and before != ON_GPU:                                  # a GPU does not survive a fork
        ours, output = os.pipe()
        child = multiprocessing.get_context('fork').Process(target=forked, args=(command, before, output))
        child.start()
        os.close(output)
        with open(ours) as pipe:
            text = pipe.read()
        child.join()
        return child.exitcode, text
    launch = [sys.executable]
    if processes > 1:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    if before:
        launch += ['-c', before + 'import runpy, sys\nrunpy.run_path(sys.argv.pop(1), None, "__main__")']
    launch += command
    done = subprocess.run(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
                          env=ALONE, cwd=HERE)
    return done.returncode, done.stdout

def must_run(*arguments, **options):
    code, text = run(*arguments, **options)
    assert code == 0, f'{arguments} failed:\n{text[-3000:]}'
    return text

def must_refuse(*arguments, words, **options):
    """The script ends with exit code 1 and, instead of a traceback, a message that contains `words`."""
    code, text = run(*arguments, **options)
    assert code == 1 and 'Traceback' not in text and words in text, (arguments, text[-1500:])

def exits_with(call, *words):
    """`call` ends with SystemExit, ValueError or FileNotFoundError whose one line contains every word."""
    try:
        call()
    except (SystemExit, ValueError, FileNotFoundError) as error:
        text = str(error)
        assert '\n' not in text and all(w in text for w in words), f'{text!r} lacks one of {words}'
        return
    raise AssertionError(f'no error, expected one with {words}')

def printed(call):
    """What `call` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        call()
    return text.getvalue()

@functools.cache
def tiny_run():
    """Every stage, trained once with the tiny settings -> (folder, {script: what it printed})."""
    tiny_run.keep = tempfile.TemporaryDirectory()
    folder = tiny_run.keep.name
    return folder, {script: must_run(script, f'--out_dir={folder}') for script in TINY}

def ready_for(script, folder):
    """A folder with the files of the tiny run that `script` needs (they are replaced, never changed)."""
    os.makedirs(folder, exist_ok=True)
    for path in [path for name in INPUTS[script] for path in glob.glob(f'{tiny_run()[0]}/{name}')]:
        os.link(path, f'{folder}/{os.path.basename(path)}')
    return folder

def inside(script, *arguments):
    """The globals of a script that ran to its end in this process, tiny settings first."""
    command, seen = [f'{HERE}/{script}', *TINY.get(script, []), *OFTEN, *arguments], []
    with mock.patch.object(sys, 'argv', command), contextlib.redirect_stderr(io.StringIO()):
        printed(lambda: seen.append(runpy.run_path(command[0], run_name='__main__')))
    return seen[0]['update'].__globals__

def same(a, b, where=''):
    """Two nested containers of tensors are equal bit for bit."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, (where, a, b)

def small_model(**changes):
    torch.manual_seed(0)
    model = M.MDM(**{**dict(N=16, V=12, D=24, depth=2, n_head=2, n_words=5, T=3), **changes})
    for p in model.parameters():                       # away from the zeros and ones of the start
        p.data += 0.1 * torch.randn(p.shape)
    return model.eval()

def network(state, weights='ema'):
    """The transformer that a checkpoint holds."""
    model = M.MDM(**state['args']).requires_grad_(False)
    model.load_state_dict(state[weights])
    return model

def small_tokenizer():
    torch.manual_seed(0)
    return T.Tokenizer(image_size=16, ch=8, ch_mult='1,1,2', n_res=1, n_codes=12, code_dim=4).eval()


# -----------------------------------------------------------------------------
# Overrides

def settings(**more):
    return dict(**more, __file__='x.py', lr=0.1, steps=10, note='', flag=False, batch_size=8, D=96, SIZE=1)

def test_overrides_take_every_documented_form():
    for words, changed in (('--lr=1', dict(lr=1.0)), ('--steps=1e5', dict(steps=100000)), ('--D=32', dict(D=32)),
                           ('--note=123', dict(note='123')), ('--note=a=b', dict(note='a=b')), ('', {}),
                           ('--flag', dict(flag=True)), ('--flag=False', {}), ('--flag 0', {}),
                           ('--flag --lr 2', dict(flag=True, lr=2.0)), ('--lr -0.2', dict(lr=-0.2)),
                           ('--batch-size 4', dict(batch_size=4))):
        g, wanted = settings(), {**settings(), **changed}
        assert T.configure(g, words.split()) == {k: v for k, v in wanted.items() if k not in ('__file__', 'SIZE')}
        assert g == wanted and all(type(g[k]) is type(v) for k, v in wanted.items()), words

def test_overrides_refuse_with_one_line():
    bad = lambda *argv: lambda: T.configure(settings(out_dir='out', teacher='ours', teacher_path=''), list(argv))
    exits_with(bad('--out_dir='), '--out_dir= cannot be')
    exits_with(bad('--teacher_path=x.pt'), 'published weights', '--ckpt=x.pt')
    exits_with(bad('--batchsize=3'), 'x.py', 'unknown setting --batchsize', 'did you mean --batch_size?')
    exits_with(bad('--SIZE=3'), 'unknown setting')
    exits_with(bad('--steps=1.5'), 'int', 'default 10', "'1.5'")
    exits_with(bad('--steps=many'), 'int', "'many'")
    exits_with(bad('--flag=maybe'), 'true, false, 1 or 0', "'maybe'")
    exits_with(bad('--lr=fast'), 'float', 'default 0.1', "'fast'")
    exits_with(bad('--lr'), '--lr needs a value')
    exits_with(bad('--lr', '--flag'), '--lr needs a value')
    exits_with(bad('lr=3'), "stray word 'lr=3'", '--name=value')
    exits_with(bad('-lr', '3'), 'stray word')
    exits_with(bad('--batch_size=0'), '--batch_size=0', 'at least 1')
    more = settings(tau=1.0, seed=0, r_init=0.5, schedule='arccos', relax='soft', warmup=0, beta2=0.9, cfg_scale=1.0,
                    bench=True, p_full=0.5, p_near=0.2)
    for setting, words in (('tau=0', 'at least'), ('r_init=2', 'between 0 and 1'), ('r_init=nan', 'finite'),
                           ('schedule=linear', "'arccos', 'cosine'"), ('relax=hard', "'soft', 'gumbel', 'st'"),
                           ('beta2=1', 'below 1'), ('cfg_scale=inf', 'finite'), ('warmup=-1', 'at least 0'),
                           ('seed=9223372036854775808', 'below'), ('p_near=0.6', 'are shares of one whole'),
                           ('steps=0', 'at least 1')):                                # as --bench needs
        exits_with(lambda: T.configure(dict(more), [f'--{setting}']), f'--{setting}', words)

def test_help_prints_the_block():
    for script in (T, M, distill, sample, reward, tteo):
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text):
                T.configure(vars(script), ['--help'])
        except SystemExit as end:
            assert end.code == 0
        assert f'python {script.__name__}.py' in text.getvalue() and 'seed = 0     ' in text.getvalue()

def test_batch_must_divide():
    assert T.split_batch(32, 0, 2) == (16, 1) and T.split_batch(32, 8, 2) == (8, 2)
    exits_with(lambda: T.split_batch(100, 16, 8),
               'batch_size 100', '8 process(es) x 16 per process = 128', '--batch_size=128')


# -----------------------------------------------------------------------------
# The shapes world

def test_image_i_is_the_same_on_every_machine():
    images, captions = T.draw(range(64))
    pixels = ((images + 1) * 127.5).round().byte().numpy().tobytes()
    digest = hashlib.sha256(pixels + '\n'.join(captions).encode()).hexdigest()
    assert digest[:16] == '36667cf50aa97aa4', digest
    again, names = T.draw([5, 63, 5])
    assert torch.equal(again[1], images[63]) and torch.equal(again[0], again[2]) and names[0] == captions[5]
    large, names = T.draw(range(64), scale=2)                                 # the same at twice the size
    assert names == captions and (F.avg_pool2d(large, 2) - images).abs().max() < 0.1 and T.check(large, names).all()

def test_drawing_10000_images_takes_seconds():
    start = time.process_time()                                              # the machine may be busy
    images, captions = T.draw(range(10_000))
    seconds = time.process_time() - start
    print(f'    10,000 images in {seconds:.1f} s')
    assert seconds < 30 and images.shape == (10_000, 3, 32, 32) and images.abs().max() <= 1
    assert set(' '.join(captions).split()) == set(T.WORDS)                   # none is unknown, none is unused
    assert max(len(c.split()) for c in captions) == T.CAPTION_LENGTH

def test_checker_accepts_real_images_and_rejects_wrong_ones():
    images, captions = T.draw(range(T.HELD_OUT, T.HELD_OUT + 3000))
    wrong = [T.wrong_caption(c, u) for c, u in zip(captions, np.random.RandomState(0).rand(3000))]
    tasks = np.array([T.parse_caption(c)[0] for c in captions])
    right, accepted = T.check(images, captions), T.check(images, wrong)
    for task in T.TASKS:
        at = tasks == task
        yes, no = right[at].mean(), accepted[at].mean()
        print(f'    {task:14s} real accepted {yes:.3f}, wrong accepted {no:.3f} ({at.sum()} images)')
        assert at.sum() > 300 and yes >= 0.95 and no <= 0.05
    exchanged = [sorted(w.split()) == sorted(c.split()) for w, c in zip(wrong, captions)]
    assert np.mean(exchanged) > 0.05                                          # as 'a red circle above a blue square'
    empty = torch.full((1, 3, 32, 32), -0.8)                                  # nothing there: no mode is covered
    assert not T.check(empty, ['a red circle'])[0] and T.factors(empty, ['four red circles'])['groups'] == 0.5

def objects_of(world='shapes', n=3000):
    """Held-out renders, their captions, and what `look` finds, with `alone` for the only one of its image."""
    images, captions = T.draw(range(T.HELD_OUT, T.HELD_OUT + n), open_background=world == 'shapes-open')
    found = T.look(images)
    found['alone'] = np.bincount(found['image'], minlength=n)[found['image']] == 1
    return images, captions, found

def modes(found):
    """One mode of each factor -> which objects show it: the large, the blue, the circles, the upper."""
    return {'size': found['size'] == 1, 'color': found['color'] == 2, 'shape': found['shape'] == 0,
            'position': found['alone'] & (found['row'] < 16)}

def test_real_renders_follow_the_known_law_of_every_factor():
    for world in ('shapes', 'shapes-open'):
        images, captions, _ = objects_of(world)
        truth = T.factors(images, captions, world)
        print(f'    {world}: ' + ', '.join(f'{k} {v:.3f}' for k, v in truth.items()))
        assert set(truth) == {'size', 'pairs', 'color pairs', 'groups', 'position', 'color', 'shape', 'background'}
        assert max(truth.values()) < 0.06

def test_factors_see_a_dropped_mode():
    images, captions, found = objects_of('shapes-open')
    for factor, shown in modes(found).items():
        keep = np.setdiff1d(range(3000), found['image'][shown])
        distance = T.factors(images[keep], [captions[k] for k in keep], 'shapes-open')
        assert distance[factor] > 0.2, (factor, distance)
    asked = [T.parse_caption(c) for c in captions]
    def alike(factor, tasks):
        """The distances once the objects of an image agree in a factor, whose values stay free."""
        several = np.flatnonzero([len(a[1]) > 1 and a[0] in tasks for a in asked])
        mixed = [i for i in several if np.ptp(found[factor][found['image'] == i]) > 0]
        keep = np.setdiff1d(range(3000), mixed)
        return T.factors(images[keep], [captions[k] for k in keep], 'shapes-open')
    sizes, colors = alike('size', T.TASKS), alike('color', ('two_object',))
    assert sizes['pairs'] == 0.5 and sizes['groups'] > 0.7 and sizes['size'] < 0.06
    assert colors['color pairs'] == 0.75 and colors['color'] < 0.06
    keep = np.flatnonzero(found['background'] != 1)
    rest = images[keep], [captions[k] for k in keep]
    assert T.factors(*rest, 'shapes-open')['background'] > 0.2 < T.factors(*rest, 'shapes')['background']

def test_toy_features_react_to_every_factor():
    images, captions, found = objects_of(n=8000)
    reference = M.toy_features(images[:3000])
    distance = lambda x: M.frechet_distance(M.toy_features(x[:1000]), reference)   # the same bias for all
    new = images[3000:]
    changed = dict(real=new, moved=torch.roll(new, 1, 3), recoloured=new[:, [1, 0, 2]],
                   blurred=F.avg_pool2d(new, 3, 1, 1), background=objects_of('shapes-open', 4000)[0][3000:])
    for factor, shown in modes(found).items():
        kept = new[np.setdiff1d(range(5000), found['image'][shown] - 3000)]
        assert len(kept) >= 1000
        changed[f'no {factor}'] = kept
    rows = {name: distance(x) for name, x in changed.items()}
    print('    ' + ', '.join(f'{k} {v:.1f}' for k, v in rows.items()))
    floor = rows.pop('real')
    assert all(v > 1.5 * floor for v in rows.values())

def test_captions_are_parsed_by_the_grammar():
    parse = T.parse_caption
    left = 'a red circle left of a blue square'
    assert parse(left) == ('position', [('red', 'circle'), ('blue', 'square')], 'left of')
    assert parse('three green squares') == ('counting', [('green', 'square')] * 3, '')
    assert parse('a circle') == ('single_object', [('', 'circle')], '')
    assert parse('a yellow shape') == ('colors', [('yellow', '')], '')

def test_unknown_words_are_explained_with_their_neighbours():
    exits_with(lambda: T.parse_caption('a red red'), 'outside the grammar', 'three green squares')
    exits_with(lambda: T.parse_caption('a circle and a square and a cross'), 'outside the grammar')
    for both in ('two red circles and a blue square', 'two circles left of a square', 'two circles and two squares'):
        exits_with(lambda: T.parse_caption(both), 'a number stands alone')
    exits_with(lambda: T.word_ids(['a cirle'], T.WORDS, 8), "unknown word 'cirle'", 'nearest known: circle')
    exits_with(lambda: T.word_ids(['xyzzy'], ('cat', 'dog'), 8), 'known: cat, dog')
    exits_with(lambda: T.word_ids(['a ' * 9], T.WORDS, 8), '9 words', 'at most 8')


# -----------------------------------------------------------------------------
# Folders of images

def picture_folder(root):
    """Twelve good images of every mode in two classes, and two bad files."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 56, 3), dtype=np.uint8)
    rgb, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    clear = rgb.convert('RGBA')
    clear.putalpha(0)
    files = {'cat/a.png': rgb, 'cat/grey.png': grey, 'cat/palette.png': rgb.convert('P'),
             'cat/dot.png': rgb.resize((1, 1)), 'cat/wide.png': rgb.resize((300, 20)), 'dog/b.jpg': rgb,
             'cat/la.png': rgb.convert('LA'), 'dog/cmyk.jpg': rgb.convert('CMYK'), 'dog/alpha.png': clear,
             'dog/grey16.png': Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
             'dog/bits.png': rgb.convert('1')}
    for path, image in files.items():
        os.makedirs(os.path.dirname(f'{root}/{path}'), exist_ok=True)
        image.save(f'{root}/{path}')
    rgb.convert('P').save(f'{root}/dog/mask.png', transparency=0)
    whole = open(f'{root}/cat/a.png', 'rb').read()
    open(f'{root}/cat/truncated.png', 'wb').write(whole[:len(whole) // 2])
    open(f'{root}/dog/notes.txt', 'w').write('not an image')
    os.symlink(f'{root}/nowhere.png', f'{root}/dog/dead_link.png')             # not even a file

def test_folder_reads_every_mode_and_names_bad_files_once(tmp_path):
    picture_folder(tmp_path)
    images = T.Images(tmp_path, 16)
    assert images.words == ('cat', 'dog') and images.length == 14 and images.caption_length == 1
    text = printed(lambda: [images.batch(range(14)) for _ in range(2)])
    assert [os.path.basename(p) for p in images.bad] == ['truncated.png', 'notes.txt']
    assert text.count('skipped') == 2 and all(f'skipped {path}: ' in text for path in images.bad)
    pixels, captions = images.batch([i for i in range(14) if images.files[i][0] not in images.bad])
    assert pixels.shape == (12, 3, 16, 16) and captions.count('cat') == 6
    assert images.batch(range(14))[0].shape == (14, 3, 16, 16)               # bad files replaced by good ones
    names = ('cat/grey', 'dog/grey16', 'dog/alpha')
    grey, grey16, alpha = (T.read_image(f'{tmp_path}/{name}.png', 16) for name in names)
    assert (grey == grey16).all() and np.ptp(grey) > 20 and grey.shape == (16, 16, 3)
    assert (alpha == 255).all()                                                # fully transparent shows white

def test_folder_problems_are_explained(tmp_path):
    exits_with(lambda: T.Images(f'{tmp_path}/nowhere', 32), 'no such folder', "'shapes'")
    exits_with(lambda: T.Images(tmp_path, 32), 'no files found', 'sub-folders')
    for k in range(8):
        exits_with(lambda: T.Images(tmp_path, 32), 'expected at least 8')
        open(f'{tmp_path}/{k}.txt', 'w').write('x')
    assert 'single class' in printed(lambda: T.Images(tmp_path, 32))           # a flat folder is one class
    exits_with(lambda: printed(lambda: T.Images(tmp_path, 32).batch([0])), 'not one of its 8 files')
    exits_with(lambda: T.Images('shapes', 48), 'multiples of 32 pixels, not 48', '--image_size=64')
    exits_with(lambda: T.Images('shapes', 32, expected=['cat']), 'the model knows 1 (cat')
    for k in ('10', '9', 'b', 'empty'):
        os.makedirs(f'{tmp_path}/{k}')
        for i in range(4 * (k != 'empty')):
            open(f'{tmp_path}/{k}/{i}', 'w').write('x')
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert T.Images(tmp_path, 32).words == ('9', '10', 'b')                # numbers by value, then names
    assert '8 files' in text.getvalue() and 'left out' in text.getvalue()

def test_deep_grey_images_keep_their_range(tmp_path):
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    seen = []
    for k, pixels in enumerate((grey, grey * 255, (grey * 255).astype(np.int32), (grey * 65535).astype(np.int32))):
        Image.fromarray(pixels).save(f'{tmp_path}/{k}.tif')
        seen.append(T.read_image(f'{tmp_path}/{k}.tif', 8)[..., 0].astype(int))
    assert all(abs(x - grey * 255).max() <= 1.5 for x in seen)

def test_token_cache_is_never_stale(tmp_path):
    picture_folder(f'{tmp_path}/data')
    tokenizer, device = small_tokenizer(), torch.device('cpu')
    def rows_and_caches():
        tokens = T.token_data(T.Images(f'{tmp_path}/data', 16), tokenizer, tmp_path, device)
        assert isinstance(tokens, np.memmap) and tokens.shape[1] == 17
        return len(tokens), len(glob.glob(f'{tmp_path}/tokens-*.npy'))
    assert rows_and_caches() == (12, 1) == rows_and_caches()               # used again
    Image.new('RGB', (20, 20), 'red').save(f'{tmp_path}/data/dog/new.png')
    assert rows_and_caches() == (13, 2)
    tokenizer.codebook.weight.data += 1
    assert rows_and_caches() == (13, 3)
    assert len(T.token_data(T.Images(f'{tmp_path}/data', 16), tokenizer, tmp_path, device, flips=True)) == 26


# -----------------------------------------------------------------------------
# Tokenizer

def test_quantisation_takes_the_nearest_code_and_passes_the_decoder_gradient_straight_through():
    tokenizer, images = small_tokenizer(), torch.rand(2, 3, 16, 16) * 2 - 1
    y, z, q = tokenizer(images)
    brute = torch.cdist(z, tokenizer.codebook.weight[None]).argmin(-1)
    assert torch.equal(tokenizer.encode(images), brute) and torch.equal(q, tokenizer.codebook(brute))
    at_q = q.detach().requires_grad_()
    decoded = tokenizer.decode_latents(at_q)
    assert torch.allclose(y, decoded, atol=1e-5)
    passed, = torch.autograd.grad(y.square().sum(), z)
    expected, = torch.autograd.grad(decoded.square().sum(), at_q)
    assert torch.allclose(passed, expected, atol=1e-4) and expected.abs().max() > 0.01

def test_a_new_codebook_has_codes_for_rare_patches():
    place = torch.tensor([0.0, 0.0, 9.0, -9.0])[torch.cat([torch.zeros(500), torch.arange(4)]).long()]
    z = place[:, None] + 1e-3 * torch.randn(504, 1)
    for k in range(20):
        rng = torch.Generator().manual_seed(k)
        new = lambda n, *rest: {round(v) for v in T.spread_out(z, n, rng, *rest)[:, 0].tolist()}
        assert new(3, z[:0]) == {0, 9, -9} and new(2, z[:1]) == {9, -9} and new(1, z[[0, 1, -1]], 1.0) == {9}

def test_codes_without_use_or_beside_a_busier_one_move_and_no_others(tmp_path):
    chosen = 'import torch\ntorch.bincount = lambda x, minlength: torch.arange(minlength).sub(3).abs()\n'
    for apart, expected in ((0, [3]), (1e9, list(range(31)))):                # uses 3 2 1 0 1 ... 28
        must_run('tokenizer.py', f'--out_dir={tmp_path}', '--lr=0', '--steps=52', '--save_every=49', f'--apart={apart}',
                 before=chosen)
        before, after = (torch.load(f'{tmp_path}/tokenizer{k}.pt')['net'] for k in ('.prev', ''))  # steps 49 and 52
        moved = (before.pop('codebook.weight') != after.pop('codebook.weight')).any(1)
        assert moved.nonzero()[:, 0].tolist() == expected
        same(before, after)

def test_tokenizer_trains_on_images_that_are_not_held_out_with_the_weight_on_the_commitment(tmp_path):
    inner = inside('tokenizer.py', '--commitment=0', f'--out_dir={tmp_path}')
    with mock.patch.dict(inner, draw=mock.Mock(wraps=inner['draw'])):
        inner['update']()
        assert 0 <= min(inner['draw'].call_args.args[0]) <= max(inner['draw'].call_args.args[0]) < T.HELD_OUT
    assert inner['net'].codebook.weight.grad.abs().max() > 0             # the codebook's own term has no weight


# -----------------------------------------------------------------------------
# Transformer and soft embedding

def test_one_hot_is_bitwise_the_hard_path_in_every_layout():
    for model, tokenizer in layouts():
        ids, mask = torch.randint(model.V, (3, model.N)), torch.rand(3, model.N) < 0.5
        one_hot = F.one_hot(ids, model.V).float()
        for m in (None, mask):
            hard = model.embed(ids, m)
            assert hard.shape == (3, model.L, model.D)
            for kind in (torch.float32, torch.bfloat16, torch.float64):
                assert torch.equal(hard, model.embed(one_hot.to(kind), m))
        assert torch.equal(hard, model.embed(ids.masked_fill(mask, model.mask_id)))
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(model.embed(ids, mask), model.embed(one_hot, mask))
        images = tokenizer.decode(ids)
        assert torch.equal(images, tokenizer.decode(one_hot)) and images.shape == (3, 3, 16, 16)
        assert tokenizer.encode(images).shape == (3, model.N)
        exits_with(lambda: model.embed(ids[:, :9]), f'expects ids (B, {model.N}), got (3, 9)')
        exits_with(lambda: tokenizer.decode(one_hot[..., 1:]), f'(B, {model.N}, {model.V})')

def test_soft_embedding_is_the_expectation():
    model, maskbit = small_model().double(), mini('maskbit')
    probs = torch.randn(2, 16, 12, dtype=torch.float64).softmax(-1)
    brute = sum(probs[..., v:v + 1] * model.embed(torch.full((2, 16), v)) for v in range(12))
    assert torch.allclose(model.embed(probs), brute, atol=1e-12)
    probs = torch.randn(3, 32, 8).softmax(-1)                               # MaskBit's is that of the expected bits
    assert torch.allclose(maskbit.embed(probs), maskbit.input_proj((probs @ maskbit.codes[:8]).view(3, 16, 6)))
    assert (maskbit.codes[8] == 0).all() and maskbit.codes[3].tolist() == [1, 1, -1]

def test_gradients_of_probabilities_match_finite_differences_in_every_layout():
    for model, tokenizer in layouts():
        probs = torch.randn(1, model.N, model.V, dtype=torch.float64).softmax(-1).requires_grad_()
        cond = torch.zeros(1, model.config['T']).long()
        for output in (tokenizer.double().decode, lambda p: model.double()(p, cond)):
            assert torch.autograd.gradcheck(output, probs, fast_mode=True)

def test_forward_takes_ids_probabilities_and_embeddings():
    alike = small_model(D=12), mini('maskgit', V=32, D=32), mini('maskbit', N=16, V=16, bits=4, S=1, D=16)
    for model in (small_model(), mini('maskbit'), *alike):                  # alike in shape: told apart by their sums
        ids, cond = torch.randint(model.V, (2, model.N)), torch.randint(5, (2, model.config['T']))
        logits = model(ids, cond)
        assert logits.shape == (2, model.N, model.V) and torch.equal(logits, model(model.embed(ids), cond))
        assert torch.equal(logits, model(F.one_hot(ids, model.V).float(), cond))
        below = F.one_hot(ids, model.V) - 1e-6                              # as finite differences step
        assert torch.allclose(logits, model(below, cond), atol=1e-3)
        assert not torch.allclose(logits, model(ids, model.null(cond)))
        states = model.features(model.embed(ids), cond, [1, 2])
        assert [tuple(s.shape) for s in states] == [(2, model.L, model.D)] * 2 and not torch.equal(*states)
        same(states[::-1], model.features(model.embed(ids), cond, [2, 1]))
    for layers in ([0, 3], []):
        exits_with(lambda: model.features(model.embed(ids), cond, layers), 'some of the blocks 1 to 2')

def test_noise_has_the_stated_variance():
    model, seen = small_model(N=4096, T=1, depth=1), []
    model.features = lambda emb, cond, layers: seen.append(emb) or [emb]
    ids = torch.zeros(1, 4096).long()
    model(ids, torch.zeros(1, 1).long(), sigma=0.6, rng=torch.Generator().manual_seed(0))
    noise = seen[0] - 0.8 * model.embed(ids)                                    # sqrt(1 - .6^2) = .8
    assert abs(noise.std() - 0.6) < 0.01 and abs(noise.mean()) < 0.01

def test_relaxations_are_probabilities_with_the_softmax_gradient():
    logits = torch.randn(4, 5, 7, dtype=torch.float32, requires_grad=True)
    soft = M.relaxed(logits, 'soft', 0.7)
    assert torch.equal(soft, (logits / 0.7).softmax(-1))
    weight = torch.randn(4, 5, 7)
    for kind in ('gumbel', 'st'):
        x = M.relaxed(logits, kind, 0.7, torch.Generator().manual_seed(1))
        assert torch.equal(x, F.one_hot(x.argmax(-1), 7).float())              # exactly one-hot
        assert (torch.autograd.grad((x * weight).sum(), logits)[0] != 0).all()
    hard = torch.autograd.grad((M.relaxed(logits, 'st', 0.7) * weight).sum(), logits)[0]
    assert torch.allclose(hard, torch.autograd.grad((soft * weight).sum(), logits)[0])
    many = torch.stack([M.relaxed(logits[:1, :1].detach(), kind).argmax(-1) for kind in ['gumbel'] * 4000]).flatten()
    share, truth = torch.bincount(many, minlength=7) / 4000, logits[0, 0].detach().softmax(-1)
    assert (share - truth).abs().max() < 5 * (0.25 / 4000) ** 0.5              # Gumbel-max draws from the softmax
    exits_with(lambda: M.relaxed(logits, 'hard'), 'unknown relaxation', 'soft, gumbel or st')

def test_blocks_equal_torchs_encoder_layers_with_norms_before_and_after():
    x = torch.randn(2, 7, 24)
    for post_norm in (False, True):
        ours = M.Block(24, 2, 48, post_norm, 1e-3)
        theirs = torch.nn.TransformerEncoderLayer(24, 2, 48, 0, 'gelu', 1e-3, True, norm_first=not post_norm)
        weights = [p.data.normal_(std=0.2) for p in ours.parameters()]       # the norms first, torch has them last
        theirs.load_state_dict(dict(zip(theirs.state_dict(), weights[4:] + weights[:4], strict=True)))
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)

# -----------------------------------------------------------------------------
# Masking, sampling

def test_masking_hits_the_exact_count_uniformly():
    tokens, ratio = torch.zeros(4000, 16).long(), torch.rand(4000)
    mask = M.mask_tokens(tokens, ratio)
    assert torch.equal(mask.sum(1), (ratio * 16).round().clamp(min=1).long()) and mask.dtype == torch.bool
    assert M.mask_tokens(tokens, torch.zeros(4000)).sum(1).eq(1).all()
    assert M.mask_tokens(tokens, torch.ones(4000)).all()
    assert M.mask_tokens(torch.zeros(1, 512), torch.tensor([0.75]).bfloat16()).sum() == 384
    share = M.mask_tokens(tokens, torch.full((4000,), 0.25)).float().mean(0)
    assert (share - 0.25).abs().max() < 0.04

def test_mask_ratio_follows_its_law():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.allclose(torch.cos(M.mask_ratio(u) * math.pi / 2), u) and M.mask_ratio(u)[0] == 1
    assert torch.allclose(M.mask_ratio(u, 'cosine'), torch.cos(math.pi * u / 2))
    exits_with(lambda: M.mask_ratio(u, 'linear'), "'linear'", 'arccos or cosine')

def test_token_initialisation_is_exact_and_uniform():
    x = M.init_tokens(2000, 16, 12, 0.6, torch.Generator().manual_seed(0))
    assert (x == 12).sum(1).eq(round(0.6 * 16)).all() and x.shape == (2000, 16)
    counts = torch.bincount(x[x < 12], minlength=12)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert (M.init_tokens(5, 16, 12, 0.0) < 12).all() and (M.init_tokens(5, 16, 12, 1.0) == 12).all()

def test_categorical_draws_have_the_right_frequencies():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3]).expand(200, 200, 4)
    draws = M.categorical(probs, torch.Generator().manual_seed(0))
    counts = torch.bincount(draws.flatten(), minlength=4)
    assert counts[1] == 0
    assert scipy.stats.chisquare(counts[[0, 2, 3]].numpy(), [20000, 8000, 12000]).pvalue > 1e-4

def test_top_k_and_top_p_keep_the_likeliest():
    probs = torch.tensor([[[0.1, 0.5, 0.15, 0.25]]])
    assert (M.filter_probs(probs, top_k=2) > 0).tolist() == [[[False, True, False, True]]]
    assert (M.filter_probs(probs, top_p=0.7) > 0).tolist() == [[[False, True, False, True]]]
    assert (M.filter_probs(probs, top_p=0.4) > 0).sum() == 1 and torch.equal(M.filter_probs(probs), probs)

def test_guidance_is_u_plus_s_times_c_minus_u():
    model, ids, cond = small_model(), torch.randint(13, (2, 16)), torch.randint(5, (2, 3))
    c, u = model(ids, cond), model(ids, model.null(cond))
    for s in (0.0, 1.0, 2.5):
        assert torch.allclose(M.guided_logits(model, ids, cond, s), u + s * (c - u), atol=1e-5)

def test_teacher_sampler_reveals_by_its_plan_and_keeps_what_it_revealed():
    for model, steps in (*((small_model(), steps) for steps in (1, 2, 5, 16)), (mini('maskbit'), 6)):
        seen, counts = [], M.sampling_plan(steps, model.N, model.law)[0]
        assert len(counts) == steps and sum(counts) == model.N and min(counts) >= 1
        forward = model.forward
        model.forward = lambda x, cond: seen.append(x.clone()) or forward(x, cond)
        tokens = M.sample_teacher(model, torch.randint(5, (6, model.config['T'])), steps, cfg_scale=1.0)
        assert ((tokens >= 0) & (tokens < model.V)).all() and len(seen) == steps
        for k, x in enumerate(seen):
            shown = x != model.mask_id
            assert shown.sum(1).eq(sum(counts[:k])).all() and torch.equal(x[shown], tokens[shown])
    assert M.reveal_counts(8, 256) == [1, 18, 26, 32, 38, 43, 48, 50]           # the published MaskGIT table
    exits_with(lambda: M.reveal_counts(17, 16), '1..16', '17')

def test_teacher_sampler_reveals_the_most_confident_first_and_noise_in_proportion():
    model, seen, place = small_model(N=12), [], torch.arange(12)             # place i: i + 1 equally likely codes
    flat = torch.zeros(12, 12).masked_fill(place > place[:, None], -1e9)
    model.forward = lambda x, cond: seen.append(x.clone()) or flat.expand(len(x), -1, -1)
    M.sample_teacher(model, torch.zeros(2, 3).long(), 12, 1.0, gumbel=0.0)
    assert all(torch.equal(x != 12, (place < k).expand(2, -1)) for k, x in enumerate(seen))
    M.sample_teacher(model, torch.zeros(4000, 3).long(), 2, 1.0, gumbel=1.0)   # Gumbel's maximum: in proportion to p
    law = 1 / (1 + place) / (1 / (1 + place)).sum()
    assert ((seen[-1] != 12).float().mean(0) - law).abs().max() < 0.03 and len(seen) == 14

def test_an_image_does_not_depend_on_its_batch():
    teacher, cond = small_model(), torch.randint(5, (7, 3))
    one = lambda c, rng: M.one_step(teacher, c, 0.6, 0.3, rng=rng)[1]
    many = lambda c, rng: M.sample_teacher(teacher, c, 4, rng=rng)
    for draw in (one, many):
        whole = draw(cond, M.image_rngs(0, range(7)))
        parts = [draw(cond[k:k + 2], M.image_rngs(0, range(k, min(k + 2, 7)))) for k in range(0, 7, 2)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, draw(cond, M.image_rngs(1, range(7))))
    keys = ((0, 0), (1, 0), (0, 1), (0, 0, 1), (0, 0, 'x'))
    assert len({torch.rand(1, generator=T.rng_for(*key)).item() for key in keys}) == 5


# -----------------------------------------------------------------------------
# Di[M]O

def test_divergence_is_the_two_kls_at_beta_0_and_1_and_its_gradient_equals_autograd():
    rng = torch.Generator().manual_seed(0)
    teacher, aux = (2 * torch.randn(3, 5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    mask, aux = torch.rand(3, 5, generator=rng) < 0.6, aux.requires_grad_()
    p, q = teacher.softmax(-1).numpy(), aux.detach().softmax(-1).numpy()
    for beta, kl in ((0.0, scipy.stats.entropy(p, q, axis=-1)), (1.0, scipy.stats.entropy(q, p, axis=-1))):
        assert torch.allclose(M.jeffreys(teacher, aux, mask, beta), torch.from_numpy(kl * mask.numpy()).sum(-1))
    for beta in (-0.2, 0.0, 0.5, 1.0, 1.7):
        auto, = torch.autograd.grad(M.jeffreys(teacher, aux, mask, beta).sum(), aux)
        closed = M.dimo_grad(teacher, aux.detach(), mask, beta)
        assert torch.allclose(closed, auto, atol=1e-12) and (closed[~mask] == 0).all()

def test_surrogate_hands_its_gradient_to_the_logits():
    logits, grad = torch.randn(4, 5, 7, requires_grad=True), torch.randn(4, 5, 7)
    M.surrogate(logits, grad).backward()
    assert torch.allclose(logits.grad, grad / 4)

def test_auxiliary_loss_counts_masked_positions_only():
    logits, tokens = torch.randn(2, 16, 12, requires_grad=True), torch.randint(12, (2, 16))
    mask = M.mask_tokens(tokens, torch.tensor([0.3, 0.7]))
    loss = M.aux_loss(logits, tokens, mask, 0.0)
    brute = -(logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * mask).sum() / mask.sum()
    assert torch.allclose(loss, brute)
    smooth = 0.9 * loss - 0.1 * logits.log_softmax(-1)[mask].mean()
    assert torch.allclose(M.aux_loss(logits, tokens, mask, 0.1), smooth)
    loss.backward()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).all()
    entropy, top = M.token_entropy(torch.zeros(2, 5, 8))
    assert abs(entropy - math.log(8)) < 1e-5 and abs(top - 1 / 8) < 1e-6

def test_remasking_hides_masked_tokens_only():
    tokens = torch.randint(12, (200, 16))
    x_t, mask = M.remask(tokens, 12, 'arccos', torch.Generator().manual_seed(0))
    assert (x_t[mask] == 12).all() and torch.equal(x_t[~mask], tokens[~mask])
    assert 0.5 < mask.float().mean() < 0.8                                     # 2 / pi on average
    assert M.remask(tokens, 12, 'arccos', None, p_full=1.0)[1].all()
    tokens = torch.randint(12, (400, 32))                                      # p_near: 1 to 32 / 8 of them stay
    seen = (~M.remask(tokens, 12, 'arccos', torch.Generator().manual_seed(0), p_near=1.0)[1]).sum(1)
    assert set(seen.tolist()) == {1, 2, 3, 4} and seen.bincount()[1:].min() > 75
    kinds = M.remask(tokens, 12, 'arccos', torch.Generator().manual_seed(0), p_full=0.5, p_near=0.5)[1].sum(1)
    assert 150 < (kinds == 32).sum() < 250 and (kinds >= 28).all()

def test_gradients_flow_from_one_step_to_the_generator_only():
    generator, teacher = small_model(), small_model().requires_grad_(False)
    cond = torch.randint(5, (4, 3))
    logits, tokens = M.one_step(generator, cond, 0.6, 0.3)
    x_t, mask = M.remask(tokens, 12, 'arccos', None)
    grad = M.dimo_grad(M.guided_logits(teacher, x_t, cond, 2.0), generator(x_t, cond).detach(), mask, 0.0)
    M.surrogate(logits, grad).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in generator.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and not tokens.requires_grad


# -----------------------------------------------------------------------------
# The GAN stage

def gan_parts(B=4):
    """A frozen teacher, its discriminator, real tokens, conditions and a generator's logits."""
    teacher = small_model(depth=4).requires_grad_(False)
    layers = gan.head_layers(4)
    disc = gan.Discriminator(teacher.D, teacher.L, layers, 3 * teacher.D, 16, True)
    real, cond = torch.randint(12, (B, 16)), torch.randint(5, (B, 3))
    judge = lambda x, r, mask: disc(teacher.features(teacher.embed(x, mask), cond, layers),
                                    teacher.cond_emb(cond).flatten(1), r)
    return teacher, disc, real, torch.randn(B, 16, 12, requires_grad=True), judge

def test_heads_sit_on_evenly_spaced_blocks():
    assert [gan.head_layers(d) for d in (4, 6, 12, 24)] == [[1, 2, 4], [2, 4, 6], [3, 6, 9, 12], [6, 12, 18, 24]]

def test_gan_gradient_reaches_the_logits_and_never_the_teacher():
    teacher, disc, real, logits, judge = gan_parts()
    r, mask = torch.full((4, 1), 0.5), M.random_positions((4, 16), 8, None, 'cpu')
    for relax in ('soft', 'gumbel', 'st'):
        logits.grad = None
        gan.gan_loss(judge(M.relaxed(logits, relax), r, mask), False).backward()
        assert torch.equal(logits.grad.abs().sum(-1) > 0, ~mask), relax          # masked positions say nothing
        assert all(p.grad is None for p in teacher.parameters())

def test_real_equals_fake_where_everything_is_masked_or_the_fake_is_real():
    teacher, disc, real, logits, judge = gan_parts()
    disc.eval()
    everything, nothing = torch.ones(4, 16, dtype=torch.bool), torch.zeros(4, 16, dtype=torch.bool)
    one, one_hot = torch.ones(4, 1), F.one_hot(real, 12).float()
    assert torch.equal(judge(real, one, everything), judge(logits.softmax(-1), one, everything))
    a, b = judge(real, 0 * one, nothing), judge(one_hot, 0 * one, nothing)
    assert torch.equal(a, b) and ((a > 0).float().mean() + (b < 0).float().mean()) / 2 == 0.5

def test_discriminator_overfits_a_fixed_pair():
    teacher, disc, real, logits, judge = gan_parts(8)
    r, mask = torch.full((8, 1), 0.3), M.random_positions((8, 16), 5, None, 'cpu')
    optimizer = torch.optim.AdamW(disc.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for _ in range(60):
        d_real, d_fake = judge(real, r, mask), judge(logits.detach().softmax(-1), r, mask)
        optimizer.zero_grad()
        gan.disc_loss(d_real, d_fake, False).backward()
        optimizer.step()
    assert (d_real > 0).all() and (d_fake < 0).all()
    states, words = [torch.randn(8, 16, 24)] * 3, torch.randn(8, 72)             # caption and masked share are heard
    a, b, c = (disc.eval()(states, *given) for given in ((words, r), (0 * words, r), (words, 0 * r)))
    assert (a - b).abs().min() > 1e-4 and (a - c).abs().min() > 1e-4

def test_gan_losses_have_their_closed_forms():
    real, fake = torch.randn(6), torch.randn(6)
    assert torch.allclose(gan.gan_loss(fake, False), -fake.sigmoid().log().mean())
    assert torch.allclose(gan.disc_loss(real, fake, False), -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean())
    assert gan.disc_loss(torch.tensor([2.0]), torch.tensor([-2.0]), True) == 0
    assert gan.gan_loss(fake, True) == -fake.mean()

def test_bias_of_soft_embeddings_obeys_its_bound():
    rng, table = torch.Generator().manual_seed(0), torch.randn(12, 3, dtype=torch.float64)
    probs = torch.randn(5, 2, 12, dtype=torch.float64).softmax(-1)
    square = lambda e: e.square().sum((1, 2))[:, None]                           # Lip = 2: bias = tr Cov(e) exactly
    bias, bound, trace = M.relaxation_bias(square, probs, table, rng, 4000)
    brute = (probs * (table - (probs @ table)[:, :, None]).square().sum(-1)).sum((1, 2))
    assert torch.allclose(trace, brute) and torch.allclose(bound, trace) and torch.allclose(bias, trace, rtol=0.1)
    linear, _, _ = M.relaxation_bias(lambda e: e.flatten(1) @ torch.ones(6, 2).double(), probs, table, rng)
    assert linear.abs().max() < 1e-9
    model = small_model()
    cond, soft = torch.zeros(5, 3, dtype=torch.long), torch.randn(5, 16, 12).softmax(-1)
    block = lambda e: model.features(e, cond, [1])[0]
    bias, bound, _ = M.relaxation_bias(block, soft, model.tok_emb.weight[:12], rng)
    assert (0 < bias).all() and (bias <= bound).all()

def test_muon_equals_torchs():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in ((6, 4), (4, 4), (4, 9), (6, 4))] for _ in range(2))
    optimizers = M.Muon(ours, 0.1, 0.01, 0.8), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.8)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - 1).norm() > 0.1 and (a - b).norm() < 0.02 * (b - 1).norm()                   # theirs is bfloat16

def test_ema_is_the_weighted_mean_and_starts_fast():
    for step, decay in ((10 ** 6, 0.9), (0, 0.1)):
        a, b = small_model(), small_model()
        b.bias.data += 1
        expected = decay * a.bias + (1 - decay) * b.bias
        M.ema_update(a, b, 0.9, step)
        assert torch.allclose(a.bias, expected)


# -----------------------------------------------------------------------------
# Metrics

def test_frechet_distance_equals_scipys_and_its_closed_forms():
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    x, y = normal(400, 8) @ normal(8, 8), normal(400, 8) @ normal(8, 8)
    s1, s2 = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = gap + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(M.frechet_distance(x, y) - expected) < 1e-6 * expected
    assert abs(M.frechet_distance(x, x + 3) - 8 * 9) < 1e-6                    # equal covariance: |m1 - m2|^2
    thin = x[:5]                                                               # five points: covariances of rank 4
    moments = thin.float().numpy().mean(0), np.cov(thin.T.numpy())
    assert abs(M.frechet_distance(thin, thin)) < 1e-9 and abs(M.frechet_distance(thin, moments)) < 1e-6

def test_what_is_measured_is_held_out_and_apart_from_its_reference():
    with mock.patch.object(T, 'draw', wraps=T.draw) as drawn:
        M.Reference(T.Images('shapes', 32), 10).prompts(20)
    a, b = ({int(i) for i in call.args[0]} for call in drawn.call_args_list)
    assert min(a | b) >= T.HELD_OUT and not a & b and len(a) == 10

def test_precision_and_recall_of_known_sets():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(1200, 4, generator=rng, dtype=torch.float64)
    assert M.precision_recall(real, real) == (1.0, 1.0) and M.precision_recall(real, real + 100) == (0.0, 0.0)
    collapsed = real[:1].expand(500, 4) + 1e-4 * torch.randn(500, 4, generator=rng, dtype=torch.float64)
    precision, recall = M.precision_recall(real, collapsed)
    assert precision > 0.95 and recall < 0.05
    fake, radius = real[:300] + 0.5, torch.cdist(real, real).sort(1).values[:, 3]
    brute = (torch.cdist(fake, real) < radius).any(1).double().mean()
    assert abs(M.precision_recall(real, fake)[0] - brute) < 1e-12
    far = [(1000 + x).float() for x in (real, fake)]                           # float32, far from zero
    assert M.precision_recall(*far) == M.precision_recall(*(x.double() for x in far))


# -----------------------------------------------------------------------------
# Whole runs

def test_every_stage_ends_with_its_table_log_and_pictures():
    folder, texts = tiny_run()
    numbers = dict(distill='divergence aux_loss entropy max_prob',
                   gan='divergence acc_real acc_fake d_real d_fake grad_dimo grad_gan entropy max_prob gap',
                   reward='divergence reward held_out clipped saturation toy_fd grad_dimo grad_reward')
    names = dict(distill=['teacher, 1 steps', 'teacher, 3 steps', 'student, 1 step'],
                 gan=['teacher, 3 steps', 'distill, 1 step', 'gan, 1 step'],
                 reward=['teacher, 2 steps', 'start, distill', 'rewarded, 1 step'])
    for stage, keys in numbers.items():
        rows = json.load(open(f'{folder}/{stage}.json'))['rows']
        assert [r['name'] for r in rows] == ['real images', 'tokenizer reconstruction', *names[stage]]
        assert all(math.isfinite(r['toy_fd']) for r in rows) and 'TV background' in texts[f'{stage}.py']
        log = [json.loads(line) for line in open(f'{folder}/{stage}.log.jsonl')]
        last = torch.load(f'{folder}/{stage}.pt')['step']
        assert [r['step'] for r in log] == list(range(2, last + 1, 2)) and all(0 <= r['divergence'] < 99 for r in log)
        assert all(math.isfinite(row[key]) for row in log for key in keys.split())
        for when in ('', '-000000', f'-{last:06d}'):
            assert Image.open(f'{folder}/{stage}{when}.png').size[0] > 100
    assert all(math.isfinite(r[k]) for r in rows for k in ('reward', 'held_out', 'clipped', 'saturation'))
    assert [r['passes'] for r in json.load(open(f'{folder}/distill.json'))['rows']] == [0, 0, 1, 5, 1]
    assert '40 images per row' in texts['gan.py'] and 'against 200 held-out renders' in texts['distill.py']
    assert 'color_attr' in texts['reward.py'] and 'training two small reward models' in texts['reward.py']

def test_distillation_and_gan_move_every_weight_but_the_embedding_tables():
    teacher, student, last = (torch.load(f'{tiny_run()[0]}/{stage}.pt') for stage in ('model', 'distill', 'gan'))
    for before, after in ((teacher['ema'], student['net']), (teacher['ema'], student['aux']),
                          (teacher['ema'], student['ema']), (student['ema'], last['net'])):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == set(before) - {'tok_emb.weight', 'cond_emb.weight'}, set(before) - moved

def test_the_rewarded_generator_is_the_best_by_the_held_out_reward():
    first, before, end = (torch.load(f'{tiny_run()[0]}/{name}.pt') for name in ('distill', 'reward.prev', 'reward'))
    held, averages = [h['held_out'] for h in end['history']], [first['ema'], before['average'], end['average']]
    same(end['ema'], averages[held.index(max(held))])
    must_run('sample.py', f'--ckpt={tiny_run()[0]}/reward.pt', '--n=2')

def test_each_update_alone_moves_its_network_the_right_way(tmp_path):
    rng, networks = lambda: torch.Generator().manual_seed(0), {}
    folder = ready_for('distill.py', tmp_path)
    for part, off in (('net', 'aux'), ('aux', 'generator')):                 # train one, keep the other where it starts
        must_run('distill.py', f'--out_dir={folder}', f'--{off}_lr=0', f'--{off}_muon=0', '--warmup=0',
                 '--cfg_scale=3', '--tau=0.05', '--steps=20', '--teacher_steps=1')
        networks[part] = network(torch.load(f'{folder}/distill.pt'), part)
    saved = torch.load(f'{folder}/model.pt')
    teacher, cond = network(saved), saved['prompts'][:500].long()
    draw = lambda net: M.one_step(net, cond, tau=0.05, rng=rng())
    (before, tokens), (after, _) = draw(teacher), draw(networks['net'])
    x_t, mask = M.remask(tokens, teacher.mask_id, 'arccos', rng())
    grad = M.dimo_grad(M.guided_logits(teacher, x_t, cond, 3), teacher(x_t, cond), mask, distill.beta)
    moved = ((after - before) * grad).sum().item()
    losses = [M.aux_loss(net(x_t, cond), tokens, mask).item() for net in (teacher, networks['aux'])]
    print(f'    logits moved along the divergence gradient by {moved:.3f}; auxiliary loss {losses[0]:.4f} -> '
          f'{losses[1]:.4f}')
    assert moved < 0 and losses[1] < losses[0]

def test_the_released_order_gives_the_auxiliary_model_a_draw_of_its_own(tmp_path):
    folder, kept = ready_for('distill.py', tmp_path), []
    inner = inside('distill.py', '--steps=1', '--teacher_steps=1', '--reuse=false', f'--out_dir={folder}')
    parts = dict(remask=lambda *given: kept.append(M.remask(*given)) or kept[-1],
                 aux_loss=lambda z, tokens, mask, _: kept.append((tokens, mask)) or M.aux_loss(z, tokens, mask))
    with mock.patch.dict(inner, parts):
        inner['update']()
    (x_t, hidden), (tokens, mask) = kept[-2:]
    assert len(kept) == 3 and torch.equal(hidden, mask) and torch.equal(x_t[~mask], tokens[~mask])
    assert [o[-1].param_groups[0]['momentum'] for o in inner['optimizers']] == [0.95, inner['aux_momentum']]

def test_the_gan_gradient_alone_deceives_a_frozen_discriminator(tmp_path):
    folder = ready_for('gan.py', tmp_path)
    must_run('gan.py', f'--out_dir={folder}', '--w_dimo=0', '--disc_lr=0', '--disc_muon=0', '--disc_warmup=0',
             '--spectral=false', '--r_max=0', '--warmup=0')
    model, start, end = (torch.load(f'{folder}/{stage}.pt') for stage in ('model', 'distill', 'gan'))
    teacher, disc = network(model), gan.Discriminator(32, 64, [1, 2], 8 * 32, gan.disc_width, False)
    disc.load_state_dict(end['disc'])
    cond, losses = start['prompts'][:200].long(), []
    for generator in (network(start), network(end, 'net')):
        logits, _ = M.one_step(generator, cond, rng=torch.Generator().manual_seed(0))
        states = teacher.features(teacher.embed(logits.softmax(-1)), cond, [1, 2])
        d_fake = disc(states, teacher.cond_emb(cond).flatten(1), torch.zeros(200, 1))
        losses.append(gan.gan_loss(d_fake, False).item())
    print(f'    -log D(fake) {losses[0]:.5f} -> {losses[1]:.5f}')
    assert losses[1] < losses[0]

def test_gan_warns_once_of_a_saturated_discriminator_and_of_mere_sharpening(tmp_path):
    first = dict(acc_real=0.6, acc_fake=0.6, entropy=0.2, gap=1.0)
    assert gan.advice(first, first) == set() == gan.advice(dict(entropy=0.09, gap=0.9), first)
    (wins,), (sharp,) = (gan.advice({**first, **row}, first) for row in (dict(acc_real=0.95, acc_fake=0.95),
                                                                         dict(entropy=0.09, gap=0.4)))
    assert '--disc_lr' in wins and '--relax=st' in sharp
    text = must_run('gan.py', f'--out_dir={ready_for("gan.py", tmp_path)}', '--steps=3', '--log_every=1',
                    '--batch_size=32', '--disc_warmup=150', '--disc_muon=0', '--disc_lr=0.01', '--spectral=false',
                    '--r_max=0')
    assert text.count(wins) == 1

def test_recomputing_blocks_changes_no_bit_of_a_run_with_hinge_losses(tmp_path):
    nets = []
    for switch in ('false', 'true'):
        folder = ready_for('gan.py', f'{tmp_path}/{switch}')
        must_run('gan.py', f'--out_dir={folder}', '--steps=4', '--hinge', f'--grad_checkpoint={switch}')
        nets.append(torch.load(f'{folder}/gan.pt')['net'])
    same(*nets)

def test_a_gan_run_adds_up_its_gradients_masks_alike_and_leaves_none_in_its_teacher(tmp_path):
    folder, kept, real = ready_for('gan.py', tmp_path), [], torch.randint(32, (8, 64))
    inner = inside('gan.py', '--steps=2', f'--out_dir={folder}')
    same(dict(inner['teacher'].state_dict()), torch.load(f'{folder}/model.pt')['ema'])
    assert all(p.grad is None for p in inner['teacher'].parameters())
    assert all(p.grad.abs().max() > 0 for p in inner['disc'].heads[0].enter.parameters())
    parts = dict(relaxed=lambda z, *_: kept.append(z) or M.relaxed(z), gan_loss=lambda *_: kept[0].mean(0).sum(),
                 dimo_grad=lambda z, *_: torch.full_like(z, 2),
                 surrogate=lambda z, grad: kept.append(grad) or (0 * z).sum())
    with mock.patch.dict(inner, parts):                                      # gradients of 1 and 2 per image
        inner['update']()
    assert torch.allclose(kept[1], torch.full_like(kept[1], gan.w_gan + 2 * gan.w_dimo))
    with mock.patch.dict(inner, relaxed=lambda z, *_: z):                    # a fake that is real: the same masks
        states, _, r, _ = inner['discriminate'](real, torch.zeros(8, 8).long(), F.one_hot(real, 32).float(), None)
    assert all(torch.allclose(*h.chunk(2), atol=1e-3) for h in states) and r.max() <= gan.r_max

def test_compiled_networks_give_the_same_log(tmp_path):
    if not shutil.which('g++'):
        raise SkipTest('torch.compile needs a C++ compiler')
    rows, folder = [], ready_for('distill.py', f'{tmp_path}/out')
    for choice in ('--compile=false', '--compile'):
        must_run('distill.py', f'--out_dir={folder}', choice, '--steps=4', '--teacher_steps=1',
                 before=PRECISION.format(False))
        rows.append([json.loads(line) for line in open(f'{folder}/distill.log.jsonl')][:2])
    for script in ('gan.py', 'reward.py'):                                   # without the compiler
        folder = ready_for(script, f'{tmp_path}/{script}')
        text = must_run(script, f'--out_dir={folder}', '--steps=4', '--compile', before=TRACED)
        assert 'recompile_limit' not in text and 'followed' in text
    for plain, compiled in zip(*rows, strict=True):
        assert all(abs(plain[k] - compiled[k]) <= 1e-3 * (1 + abs(plain[k])) for k in plain), (plain, compiled)

def test_every_stage_runs_on_a_gpu_and_its_files_elsewhere(tmp_path):
    seen = subprocess.run([sys.executable, '-c', ON_GPU + 'import torch\nprint(torch.cuda.is_available())'],
                          capture_output=True, text=True)
    if 'True' not in seen.stdout:
        raise SkipTest('needs a CUDA GPU')
    for script in TINY:
        assert 'on cpu' not in must_run(script, f'--out_dir={tmp_path}', before=ON_GPU)
    must_run('distill.py', f'--out_dir={tmp_path}', '--steps=16', '--resume', before=ON_GPU)
    assert len(open(f'{tmp_path}/distill.log.jsonl').readlines()) == 8
    must_run('tteo.py', f'--ckpt={tmp_path}/reward.pt', '--n=5', '--iterations=2', before=ON_GPU)
    assert 'images_per_s' in must_run('sample.py', f'--ckpt={tmp_path}/model.pt', '--bench', '--batch=4', before=ON_GPU)
    must_run('sample.py', f'--ckpt={tmp_path}/gan.pt', '--n=4')                # on the CPU

def test_bias_of_the_relaxation_is_printed_beside_its_bound():
    text = must_run('gan.py', f'--out_dir={tiny_run()[0]}', '--bias')
    rows = re.findall(r'(?:decoder|first block) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)', text)
    assert len(rows) == 6 and all(float(bias) <= float(bound) for *_, bias, bound in rows)

def test_sampling_writes_the_same_image_whatever_the_batch(tmp_path):
    ask = ['--ckpt', f'{tiny_run()[0]}/distill.pt', '--prompt', 'a red circle', f'--grid={tmp_path}/grid.png']
    must_run('sample.py', *ask, '--n=3', f'--png_dir={tmp_path}/three')
    text = must_run('sample.py', *ask, '--n=2', '--batch=1', f'--png_dir={tmp_path}/single')
    assert '2 images, seeds (0, 0..1), 1 network pass' in text and os.path.exists(f'{tmp_path}/grid.png')
    read = lambda name: open(f'{tmp_path}/{name}.png', 'rb').read()
    assert len(os.listdir(f'{tmp_path}/three')) == 4 and read('single/00001') != read('single/00000')
    assert all(read(f'three/{k:05d}') == read(f'single/{k:05d}') for k in range(2))
    state = torch.load(f'{tiny_run()[0]}/distill.pt')                        # weights, tau_sample, r_init are the run's
    state['net']['bias'] += torch.randn(64, 32)
    torch.save({**state, 'config': {**state['config'], 'tau_sample': 0.5}}, f'{tmp_path}/cold.pt')
    must_run('sample.py', f'--ckpt={tmp_path}/cold.pt', *ask[2:], '--n=3', '--weights=net', f'--png_dir={tmp_path}/net')
    cond = T.word_ids(['a red circle'] * 3, T.WORDS, 8)
    for name, weights, tau in (('three', 'ema', 0.3), ('net', 'net', 0.5)):
        tokens = M.one_step(network(state, weights), cond, 0.9, 0.03, tau, M.image_rngs(0, range(3)))[1]
        image = T.Tokenizer.from_checkpoint(state['tokenizer']).decode(tokens)[2].clamp(-1, 1)
        drawn = np.asarray(Image.open(f'{tmp_path}/{name}/00002.png')).astype(float)
        assert abs(drawn - (image.detach().permute(1, 2, 0).numpy() + 1) * 127.5).max() < 1.5
    sample.write_pngs(f'{tmp_path}/three', torch.zeros(1, 3, 4, 4), ['a circle'])
    assert sorted(os.listdir(f'{tmp_path}/three')) == ['00000.png', 'captions.txt']      # nothing of the earlier call

def test_a_sweep_measures_sixteen_settings_and_prints_sample_count_seeds_and_reference(tmp_path):
    folder = ready_for('distill.py', tmp_path)
    text = must_run('sample.py', f'--ckpt={folder}/model.pt', '--sweep', '--steps=2', '--n_metrics=30',
                    '--n_reference=600')
    assert '30 images per row' in text and '600 held-out renders' in text and 'seeds (0, 0..29)' in text
    assert all(task in text for task in T.TASKS)
    rows = json.load(open(f'{folder}/model-sweep.json'))['rows']
    assert len({r['name'] for r in rows} - {'real images'}) == 16 and all(r['toy_fd'] > 0 for r in rows), rows

def test_folder_goes_through_the_whole_pipeline(tmp_path):
    for k in range(40):
        name = f'{tmp_path}/data/{"zero one".split()[k % 2]}'
        os.makedirs(name, exist_ok=True)
        Image.new('L', (28, 28), 60 * (k % 2) + k).save(f'{name}/{k}.png')
    judge = M.Reference(T.Images(f'{tmp_path}/data', 32))
    assert judge.measure(*reversed(judge.prompts(20)))['accuracy'] > 0.8     # real ones get their own class
    folder, ask = f'{tmp_path}/out', ['sample.py', '--ckpt', f'{tmp_path}/out/distill.pt', '--n=2']
    for script in list(TINY)[:4]:                                            # reward.py has no --data
        must_run(script, f'--out_dir={folder}', f'--data={tmp_path}/data', '--steps=5')
    reference = json.load(open(f'{folder}/distill.json'))['rows'][0]['reference']
    assert reference == f'20 images of {tmp_path}/data (real images: 20 others)'
    for label in ('zero', '1'):                                            # the classes are 0 one, 1 zero
        must_run(*ask, f'--label={label}', f'--png_dir={tmp_path}/{label}')
        assert open(f'{tmp_path}/{label}/captions.txt').read() == '00000.png\tzero\n00001.png\tzero\n'
    must_refuse(*ask, '--label=two', words='one, zero')
    must_refuse('distill.py', f'--out_dir={folder}', words='was trained on')
    os.rename(f'{tmp_path}/data', f'{tmp_path}/moved')
    text = must_run('distill.py', f'--teacher_ckpt={folder}/model.pt', f'--data={tmp_path}/moved', '--steps=1',
                    f'--out_dir={tmp_path}/again')
    assert f'20 images of {tmp_path}/moved' in text

def test_missing_or_unfinished_teacher_is_trained_first(tmp_path):
    with mock.patch.object(subprocess, 'Popen') as launched:
        def trained(folder):
            launched.reset_mock()
            with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
                distill.train_missing('shapes', folder, 7)
            return [call.args[0][1:] for call in launched.call_args_list], text.getvalue()
        commands, text = trained(f'{tmp_path}/new')
        assert commands == [[f'{HERE}/tokenizer.py', '--data=shapes', '--seed=7', f'--out_dir={tmp_path}/new']]
        assert 'tokenizer.pt is missing' in text and '3 minutes' in text
        launched.return_value.wait.side_effect = [KeyboardInterrupt, 0]        # Ctrl-C: wait until the child has saved
        assert len(trained(f'{tmp_path}/new')[0]) == 1 and launched.return_value.wait.call_count == 2
        launched.return_value.wait.side_effect = None
        made = dict(steps=5, data='shapes')
        T.save_checkpoint(f'{tmp_path}/tokenizer.pt', dict(stage='tokenizer', step=5, config=made))
        os.rename(f'{tmp_path}/tokenizer.pt', f'{tmp_path}/tokenizer.prev.pt')  # killed between two renames
        T.save_checkpoint(f'{tmp_path}/model.pt', dict(stage='model', step=4, config=dict(made, D=32)))
        commands, text = trained(tmp_path)
        assert commands == [[f'{HERE}/model.py', '--steps=5', '--data=shapes', '--D=32', '--resume=True',
                             f'--out_dir={tmp_path}']] and 'using the previous one' in text
        T.save_checkpoint(f'{tmp_path}/model.pt', dict(stage='model', step=5, config=made))
        assert trained(tmp_path) == ([], '')                               # a teacher holds its tokenizer
        exits_with(lambda: distill.train_missing('other', tmp_path, 7), 'was trained on shapes, not on other')
        os.remove(f'{tmp_path}/model.pt'), os.remove(f'{tmp_path}/model.prev.pt')
        exits_with(lambda: distill.train_missing('other', tmp_path, 7), 'was trained on shapes, not on other')

def test_ending_distill_ends_the_training_that_it_started(tmp_path):
    child = subprocess.Popen([sys.executable, f'{HERE}/distill.py', f'--out_dir={tmp_path}'], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while 'tokens of' not in child.stdout.readline():                      # the tokenizer's plan: it trains
        assert child.poll() is None
    child.terminate()
    os.killpg(child.pid, signal.SIGTERM)                                   # the trainer gets it twice
    assert child.wait(60) == 1
    text = child.stdout.read()
    assert 'tokenizer.py did not finish' in text and 'stopped' not in text and 'Traceback' not in text, text

def test_a_second_wish_to_stop_counts_after_a_second():
    with mock.patch.object(signal, 'signal'):
        stop = T.Stop()
    assert not stop.now(0, 'cpu')
    stop.ask(signal.SIGINT, None), stop.ask(signal.SIGTERM, None)
    assert stop.now(0, 'cpu')
    stop.asked -= 2
    try:
        stop.ask(signal.SIGINT, None)
    except KeyboardInterrupt:
        return
    raise AssertionError('went on')

def test_a_run_killed_or_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole, step = tiny_run()[0], 'torch.optim.AdamW.step'
    for k, (script, call, nth, how) in enumerate((
            ('tokenizer.py', 'os.replace', 3, 'SIGKILL'),                  # between the two renames of a save
            ('model.py', step, random.randint(5, 8), 'SIGKILL'),           # any update after the first save, at step 4
            ('model.py', step, random.randint(5, 7), 'SIGINT'),            # Ctrl-C: saves and ends in peace
            ('distill.py', step, random.randint(9, 24), 'SIGKILL'),        # in either half of an update
            ('gan.py', step, random.randint(15, 36), 'SIGKILL'),
            ('reward.py', step, random.randint(9, 15), 'SIGKILL'),
            ('reward.py', step, random.randint(9, 14), 'SIGINT'))):
        print(f'    {script} gets {how} at number {nth} of {call}')
        folder, name = ready_for(script, f'{tmp_path}/{k}'), script[:-3]
        code, text = run(script, f'--out_dir={folder}', before=KILL.format(call=call, nth=nth, signal=how))
        assert code == (-signal.SIGKILL if how == 'SIGKILL' else 0) and 'Traceback' not in text, text[-1500:]
        assert os.path.exists(f'{folder}/{name}.log.jsonl')
        if how == 'SIGINT':                                                # reward.py: a call for each of two networks
            assert torch.load(f'{folder}/{name}.pt')['step'] == (nth if name == 'model' else -(-nth // 2))
        must_run(script, f'--out_dir={folder}', '--resume')
        a, b = (torch.load(f'{f}/{name}.pt', weights_only=True) for f in (whole, folder))
        same({**a, 'config': 0}, {**b, 'config': 0})
        lines = [open(f'{f}/{name}.log.jsonl').read() for f in (whole, folder)]
        assert lines[0] == lines[1] and lines[0].count('\n') == a['step'] // 2

def test_every_stage_runs_in_float32_and_in_bfloat16(tmp_path):
    other = not getattr(torch.cpu, 'get_capabilities', dict)().get('avx512_bf16')         # the tests above run in one
    for script in TINY:
        text = must_run(script, f'--out_dir={tmp_path}', before=PRECISION.format(other))
        assert ('bf16 autocast' if other else 'float32, the CPU has no bf16') in text, text[:300]
    tokenizer, z = small_tokenizer(), torch.randn(2, 16, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(tokenizer.nearest(z), tokenizer.double().nearest(z.double()))

def test_gradients_are_averaged_then_clipped():
    for clip, moved in ((1.0, [-0.6, 0.0, -0.8]), (0.0, [-3.0, 0.0, -4.0])):     # 0: no limit
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([6.0, 0.0, 8.0])                                   # the sum of two micro-batches
        assert T.apply_gradients([p], [torch.optim.SGD([p], 1.0)], 2, clip) == 5
        assert torch.allclose(p.data, torch.tensor(moved), atol=1e-4)

def test_two_processes_give_the_gradient_of_one(tmp_path):
    def gradients(script, folder, processes):
        """What Adam and Muon hold after one step: multiples of the averaged, clipped gradient."""
        plain = ['--disc_warmup=0', '--spectral=false'] * (script == 'gan.py')    # its power iteration counts passes
        must_run(script, f'--out_dir={folder}', '--steps=1', '--micro_batch=4', *plain, processes=processes)
        state = torch.load(f'{folder}/{script[:-3]}.pt', weights_only=True)
        kept = [s for o in state.get('optimizers', [state.get('optimizer')]) for s in o['state'].values()]
        return [s['exp_avg' if 'exp_avg' in s else 'momentum_buffer'] for s in kept]
    for script in TINY:
        one, two = (gradients(script, ready_for(script, f'{tmp_path}/{script}{n}'), n) for n in (1, 2))
        assert len(one) == len(two) > 10
        for a, b in zip(one, two):
            assert (a - b).abs().max() < 1e-4 * max(x.abs().max() for x in one), script

def test_bench_times_what_compilation_would_see():
    from torch.utils._python_dispatch import _get_current_dispatch_mode
    free = []                                                                # calls with no FLOP counter around them
    T.report_bench(lambda: free.append(_get_current_dispatch_mode() is None), 1, torch.device('cpu'),
                   contextlib.nullcontext())
    assert all(free[:23]) and not free[23] and len(free) == 24

def test_bench_shows_that_one_pass_for_both_updates_saves_two_forwards_of_ten(tmp_path):
    folder, flops = ready_for('distill.py', tmp_path), []
    for reuse in ('true', 'false'):
        settings = [f'--out_dir={folder}', f'--reuse={reuse}', '--cfg_scale=2']
        text = must_run('distill.py', '--bench', *settings)
        bench = {k: float(v) for k, v in re.findall(r'(\w+) ([\d.]+)', text[text.index('bench: '):])}
        assert bench['ms_per_step'] > 0 and bench['images_per_s'] > 0 and bench['peak_memory_mb'] > 100
        assert 0 < bench['share_of_peak'] < 1
        flops.append(bench['gflop_per_step'])
    assert 1.15 < flops[1] / flops[0] < 1.35, flops                        # 10 / 8, but for frozen tables


# -----------------------------------------------------------------------------
# Published teachers

def golden(name):
    if not os.environ.get('GOLDEN'):
        raise SkipTest('GOLDEN is not set')
    return torch.load(os.path.join(os.environ['GOLDEN'], f'{name}.pt'), weights_only=True)

def near(a, b):
    assert a.shape == b.shape and (a - b).abs().max() < 1e-4, (a.shape, b.shape, (a - b).abs().max())

def conditions(model, inputs):
    """Labels as they are, some of them dropped, all of them dropped."""
    labels = inputs['labels']
    return labels, torch.where(inputs['drop_label'], model.n_words, labels), model.null(labels)

def subcodes(index, bits):
    """Full indices (B, L) -> the two sub-token ids of every position (B, 2 L), low bits first."""
    return torch.stack([index % 2 ** (bits // 2), index >> bits // 2], -1).flatten(1)

def mini(kind, **changes):
    """A small transformer of random weights in the shape of a published one."""
    sizes = dict(maskgit=dict(N=16, V=32), maskbit=dict(N=32, V=8, bits=3, S=2, post_norm=True, eps=1e-12))[kind]
    return small_model(**{**dict(D=32, n_head=16, n_words=10, T=1, mlp=40), **sizes, **changes})

def mini_tokenizer(kind, **changes):
    torch.manual_seed(0)
    sizes = dict(maskgit=dict(n_codes=32, code_dim=5, z=6, mid=2, up=2, attention='2,mid'),
                 maskbit=dict(n_codes=8, code_dim=3, S=2, mid=1, up=1))[kind]
    return T.Tokenizer(**{**dict(image_size=16, ch=32, ch_mult='1,1,2', n_res=1, groups=32), **sizes, **changes}).eval()

def layouts():
    """A small transformer and its tokenizer in our own layout, MaskGIT's and MaskBit's."""
    published_ones = [(mini(kind), mini_tokenizer(kind)) for kind in ('maskgit', 'maskbit')]
    return [(small_model(), small_tokenizer()), *published_ones]

def published(network, kind):
    """The weights of a network of ours in the published layout."""
    own = network.state_dict()
    if isinstance(network, T.Tokenizer):
        depth = network.config['ch_mult'].count(',') + 1
        return {T.published_name(k, kind, depth): v for k, v in own.items() if k != 'codes'}
    state = {M.published_name(k, kind): v for k, v in own.items() if k != 'codes'}
    if kind == 'maskgit':
        state['tok_emb.weight'] = torch.cat([state['tok_emb.weight'], state.pop('class_emb.weight')])
        rest = len(state['tok_emb.weight']) - network.V
        state['bias'] = F.pad(state['bias'], (0, rest, 0, 1), value=7.0)        # the entries that must be dropped
        return dict(iter=1, global_epoch=1, model_state_dict=state, optimizer_state_dict={})
    return state

@torch.no_grad()
def test_maskgit_transformer_equals_the_golden_logits():
    file = golden('maskgit_transformer')
    x, y = file['inputs'], file['outputs']
    for weights in (file['checkpoint'], file['checkpoint']['model_state_dict']):   # the flat one is Di[M]O's student
        model = M.MDM.from_pretrained('maskgit', weights, n_head=4)
        for cond, name in zip(conditions(model, x), ('', '_drop', '_all_drop')):
            near(model(x['tokens'].flatten(1), cond), y[f'logits{name}'][..., :32])
            near(model(x['tokens'].flatten(1), cond[:, None]), y[f'logits{name}'][..., :32])

@torch.no_grad()
def test_maskbit_generators_equal_the_golden_logits():
    for name, bits in (('maskbit_generator', 6), ('maskbit_generator_14bit', 14)):
        file = golden(name)
        x, y, tokens = file['inputs'], file['outputs'], file['inputs']['tokens'].flatten(1)
        assert torch.equal(subcodes(x['index'], bits), y['split'].flatten(1))
        for prefix in ('input_proj', 'token_emb'):                              # the latter in some released files
            weights = {key.replace('input_proj', prefix): value for key, value in file['state_dict'].items()}
            model = M.MDM.from_pretrained('maskbit', weights, n_head=4)
            assert torch.equal(F.embedding(tokens, model.codes).view(3, 16, bits), y['bits_in'])
            for cond, part in zip(conditions(model, x), ('cond', 'drop', 'uncond')):
                near(model(tokens, cond), y[f'logits_{part}'].flatten(1, 2))

def test_taming_vqgan_equals_the_golden_images():
    file = golden('taming_vqgan')
    x, y, tokenizer = file['inputs'], file['outputs'], T.Tokenizer.from_pretrained('maskgit', file['checkpoint'])
    near(tokenizer.decode(x['code'].flatten(1)), y['image_from_code'])
    near(tokenizer.latents(x['image']), y['encoder_out'].flatten(2).transpose(1, 2))
    assert torch.equal(tokenizer.encode(x['image']), y['indices'].flatten(1))

def test_maskbit_tokenizers_equal_the_golden_images():
    for name in ('maskbit_tokenizer', 'maskbit_tokenizer_3level'):
        file = golden(name)
        x, y, tokenizer = file['inputs'], file['outputs'], T.Tokenizer.from_pretrained('maskbit', file['state_dict'])
        image = x['image'] * 2 - 1                                              # the file's images lie in [0, 1]
        latents = tokenizer.latents(image)
        near(latents.view(2, -1, 6), y['encoder_out'].flatten(2).transpose(1, 2))
        ids = tokenizer.encode(image)
        assert torch.equal(ids, subcodes(y['indices'].flatten(1), 6))
        assert torch.equal(F.embedding(ids, tokenizer.codes).view(2, -1, 6), y['quantised'].flatten(2).transpose(1, 2))
        near((tokenizer.decode(ids) + 1) / 2, y['reconstruction'])
        near((tokenizer.decode(subcodes(x['indices'], 6)) + 1) / 2, y['image_from_indices'])

def test_sampling_plans_equal_the_golden_tables():
    tables = golden('schedules')
    assert len(tables['maskgit']) > 0
    for name, table in tables['maskgit'].items():
        expected = torch.as_tensor(table['tokens_unmasked_at_step']).tolist()
        assert M.reveal_counts(len(expected), sum(expected)) == expected, name
    published_settings = {'14bit_64steps': (7.1, 3.0), '14bit_128steps': (7.1, 3.0), '14bit_256steps': (5.8, 3.0),
                          '10bit_64steps': (6.4, 2.5)}
    for name, (scale, power) in published_settings.items():
        masked, expected = (tables['maskbit'][name][key] for key in ('masked_before_step', 'guidance_scale'))
        counts, guide, noisy = M.sampling_plan(len(masked), 512, 'maskbit', power)
        assert counts == [a - b for a, b in zip(masked.tolist(), masked.tolist()[1:] + [0])]
        assert (scale * torch.tensor(guide) - expected).abs().max() < 1e-5 and noisy[-1] == 0

def test_maskbit_guidance_follows_its_plan():
    model = mini('maskbit')
    with mock.patch.object(M, 'guided_logits', wraps=M.guided_logits) as guided:
        tokens = M.sample_teacher(model, torch.zeros(2, 1).long(), 6, cfg_scale=8.1, gumbel=7.8)
    used = [call.args[3] for call in guided.call_args_list]
    assert ((tokens >= 0) & (tokens < 8)).all() and len(used) == 6 and used[0] == 1
    assert np.allclose(used, 1 + 7.1 * np.array(M.sampling_plan(6, model.N, 'maskbit')[1]))
    assert M.teacher_passes(model, 6, 8.1) == 6 + sum(s != 1 for s in used) and M.teacher_passes(model, 6, 1.0) == 6
    shares = M.sampling_plan(64, 512, 'maskbit')[1]                              # 0 in float32 at steps 1 to 3
    assert sum(1 + (s != 0) for s in shares) == 125
    exits_with(lambda: M.sampling_plan(6, 32, 'cosine'), "'cosine'", 'maskgit or maskbit')

def test_published_sizes_have_the_published_parameter_counts():
    with torch.device('meta'):
        count = lambda network: sum(p.numel() for p in network.parameters())
        for (kind, V), total in {('maskgit', 1024): 174_160_874 - 257 * 2026 + 256 * 1024,  # unused biases dropped
                                 ('maskbit', 32): 304_728_128, ('maskbit', 128): 304_929_024,
                                 ('maskbit', 512): 305_720_320}.items():
            bits = dict(bits=V.bit_length() - 1) if kind == 'maskbit' else {}
            assert count(M.MDM(**{**M.PUBLISHED[kind], 'V': V, **bits})) == total
        assert count(T.Tokenizer(**T.PUBLISHED['maskgit'])) == 72_141_699
        tokenizer = T.Tokenizer(**T.PUBLISHED['maskbit'])
        assert count(tokenizer) == 54_489_489 and (tokenizer.N, tokenizer.V) == (512, 128)

def test_other_sizes_are_read_off_the_shapes():
    models = [('maskgit', dict(N=9, V=64, D=48, depth=1, mlp=100, n_words=7, n_head=3)),
              ('maskgit', dict(N=4, V=512, n_words=1000, D=16, n_head=2)), ('maskgit', dict(V=1024, n_words=300)),
              ('maskgit', dict(V=128, n_words=1000)),
              ('maskbit', dict(N=50, V=32, bits=5, D=24, depth=3, n_head=3, mlp=17)),
              ('maskbit', dict(N=9, V=16, bits=4, S=1)), ('maskbit', dict(N=27, V=8, bits=3, S=3)),
              ('maskbit', dict(N=18, V=512, bits=9, n_words=1000))]
    for kind, sizes in models:
        model = mini(kind, **sizes)
        again = M.MDM.from_pretrained(kind, published(model, kind), n_head=sizes.get('n_head'))
        assert again.config == model.config
        ids, cond = torch.randint(model.V + 1, (2, model.N)), torch.randint(7, (2, 1))
        assert torch.equal(model(ids, cond), again(ids, cond))
    odd = mini('maskgit', V=24, n_words=5)
    assert M.MDM.from_pretrained('maskgit', published(odd, 'maskgit'), V=24).config == odd.config
    exits_with(lambda: M.MDM.from_pretrained('maskgit', published(odd, 'maskgit'), V=0), 'V + K + 2 with V = 0')
    for kind, sizes in (('maskgit', dict(ch_mult='2,1', attention='0,1,mid', n_res=2, up=3, z=4, n_codes=10)),
                        ('maskgit', dict(ch_mult='1,3,2,2', attention='mid')),
                        ('maskbit', dict(ch_mult='3,1,2', n_res=2, up=2, mid=3)),
                        ('maskbit', dict(code_dim=9, n_codes=512)), ('maskbit', dict(code_dim=5, S=1, n_codes=32))):
        tokenizer = mini_tokenizer(kind, **sizes)
        again = T.Tokenizer.from_pretrained(kind, published(tokenizer, kind), tokenizer.grid)
        assert again.config == tokenizer.config
        ids = torch.randint(tokenizer.V, (2, tokenizer.N))
        assert torch.equal(tokenizer.decode(ids), again.decode(ids))
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        assert torch.equal(tokenizer.encode(images), again.encode(images))

def test_loading_copies_the_weights_and_reads_files_folders_and_dicts_alike(tmp_path):
    weights = published(mini('maskbit'), 'maskbit')
    torch.save(weights, f'{tmp_path}/generator.bin')
    torch.save(weights, f'{tmp_path}/old.bin', _use_new_zipfile_serialization=False)
    paths = (f'{tmp_path}/generator.bin', f'{tmp_path}/old.bin', weights)
    networks = [M.MDM.from_pretrained('maskbit', path) for path in paths]
    os.remove(f'{tmp_path}/old.bin')
    networks.append(M.MDM.from_pretrained('maskbit', tmp_path))
    for network in networks[1:]:
        same(network.state_dict(), networks[0].state_dict())
    kept = weights['pos_emb'].clone()
    for network in networks:
        network.pos_emb.data += 1                                           # training touches neither dict nor file
    assert torch.equal(weights['pos_emb'], kept)
    assert torch.equal(M.MDM.from_pretrained('maskbit', tmp_path).pos_emb, kept)
    torch.save({k: v * 0 for k, v in weights.items()}, f'{tmp_path}/generator.bin')
    assert torch.equal(networks[0].pos_emb, kept + 1)                       # no mapping of the file is left

def test_wrong_swapped_and_truncated_files_are_explained(tmp_path):
    transformer, tokenizer = M.MDM.from_pretrained, T.Tokenizer.from_pretrained
    files = {f'{kind}_{what}': published(make(kind), kind) for kind in ('maskgit', 'maskbit')
             for what, make in (('net', mini), ('tokenizer', mini_tokenizer))}
    for name, state in files.items():
        torch.save(state, f'{tmp_path}/{name}.pt')
    path = lambda name: f'{tmp_path}/{name}.pt'
    for load, kind, what in ((transformer, 'maskgit', 'net'), (transformer, 'maskbit', 'net'),
                             (tokenizer, 'maskgit', 'tokenizer'), (tokenizer, 'maskbit', 'tokenizer')):
        for name in files:
            if name != f'{kind}_{what}':
                exits_with(lambda: load(kind, path(name)), path(name), 'expected', kind, 'right file')
        flat = files[f'{kind}_{what}']
        flat = flat.get('model_state_dict', flat)
        for key in list(flat)[::7]:                                         # a key lost, a shape changed
            for broken in ({k: v for k, v in flat.items() if k != key}, {**flat, key: flat[key][..., None]}):
                exits_with(lambda: load(kind, broken), 'the given dict', 'expected')
        exits_with(lambda: load(kind, {**flat, 'foreign.weight': torch.ones(1)}), 'no place', 'foreign.weight')
        exits_with(lambda: load('magic', path('maskgit_net')), "'magic'", 'maskgit, maskbit')
        whole = open(path(f'{kind}_{what}'), 'rb').read()
        open(path('half'), 'wb').write(whole[:len(whole) // 2])
        exits_with(lambda: load(kind, path('half')), path('half'), 'truncated')
        open(path('half'), 'w').write('<html>')
        exits_with(lambda: load(kind, path('half')), path('half'), 'not a weight file')
        exits_with(lambda: load(kind, {}), 'no tensors')
        exits_with(lambda: load(kind, tmp_path), f'{tmp_path}: holds', 'weight files', 'name the file')
        exits_with(lambda: load(kind, f'{tmp_path}/nowhere.pt'), f'{tmp_path}/nowhere.pt: no such file')
    narrow = published(mini('maskgit', D=24, n_head=3), 'maskgit')
    exits_with(lambda: transformer('maskgit', narrow), '16 heads', 'n_head')
    exits_with(lambda: transformer('maskgit', narrow, n_head=-4), '-4 heads', 'n_head')
    exits_with(lambda: transformer('maskgit', {'state_dict': None, 5: torch.ones(1)}), 'no tensors')
    odd = {**files['maskbit_tokenizer'], 'encoder.conv_in.weight': torch.ones(33, 3, 3, 3)}
    exits_with(lambda: tokenizer('maskbit', odd), 'the given dict: encoder.conv_in', '33', 'right file')

class Callback:
    """A foreign class, as a Lightning checkpoint carries one."""
    def __init__(self, path):
        self.path, self.best = path, torch.ones(2)

class Settings(dict):
    """Another, which a file fills item by item."""

def test_foreign_classes_become_inert(tmp_path):
    weights = {**published(mini_tokenizer('maskgit'), 'maskgit'), 'loss.perceptual.weight': torch.ones(3)}
    torch.save(dict(epoch=1, callbacks={Callback: Callback(tmp_path), 'score': np.float64(0.5)}, hyper=Settings(lr=1),
                    state_dict=weights), f'{tmp_path}/last.ckpt')
    with mock.patch.object(Callback, '__new__', side_effect=AssertionError('a foreign class was built')):
        tokenizer = T.Tokenizer.from_pretrained('maskgit', f'{tmp_path}/last.ckpt')
    same(tokenizer.state_dict(), mini_tokenizer('maskgit').state_dict())

def test_distillation_freezes_the_embedding_tables_of_both_layouts():
    for kind, names in (('maskgit', {'tok_emb.weight', 'cond_emb.weight'}),
                        ('maskbit', {'input_proj.weight', 'input_proj.bias', 'cond_emb.weight'})):
        model = mini(kind)
        frozen = {id(p) for p in model.embedding_parameters()}
        assert {name for name, p in model.named_parameters() if id(p) in frozen} == names

def test_encoding_resumes_mirrors_and_uses_small_integers(tmp_path):
    picture_folder(f'{tmp_path}/data')
    tokenizer, source = mini_tokenizer('maskbit'), lambda: T.Images(f'{tmp_path}/data', 16)
    encode = lambda name: T.token_data(source(), tokenizer, f'{tmp_path}/{name}', torch.device('cpu'), 5, flips=True)
    whole = encode('a')
    assert whole.shape == (24, 33) and whole.dtype == np.int8 and isinstance(whole, np.memmap)
    good = [not path.endswith(('truncated.png', 'notes.txt')) for path, _ in source().files]
    images = source().batch(range(14))[0][good]
    assert np.array_equal(whole[::2, :32], tokenizer.encode(images).numpy())
    assert np.array_equal(whole[1::2, :32], tokenizer.encode(images.flip(-1)).numpy())
    calls = []
    def dies(x, real=tokenizer.encode):
        calls.append(len(x))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(x)
    with mock.patch.object(tokenizer, 'encode', dies), contextlib.suppress(KeyboardInterrupt):
        encode('b')
    assert len(calls) == 4 and not glob.glob(f'{tmp_path}/b/*.npy')
    with mock.patch.object(tokenizer, 'encode', side_effect=tokenizer.encode) as spy:
        assert '2 of 14 files were skipped' in printed(lambda: encode('b'))
    assert spy.call_count == 4 and np.array_equal(encode('b'), whole)
    assert len(os.listdir(f'{tmp_path}/b')) == 1                                # no leftovers

def test_partial_sums_of_features_merge_to_one_pass():
    x = torch.randn(700, 12, dtype=torch.float64) * 3 + 5
    moments = sample.Moments(12)
    for part in x.split(90):
        moments.add(part)
    mean, covariance = moments.result()
    assert torch.allclose(mean, x.mean(0)) and torch.allclose(covariance, torch.cov(x.T))
    y = torch.randn(500, 12, dtype=torch.float64)
    assert abs(M.frechet_distance((mean, covariance), y) - M.frechet_distance(x, y)) < 1e-6

def test_inception_score_of_uniform_is_1_and_of_balanced_one_hots_is_the_number_of_classes():
    assert abs(sample.inception_score(torch.full((100, 8), 1 / 8)) - 1) < 1e-9
    labels = sample.balanced_labels(8000, 8, 0)
    assert abs(sample.inception_score(F.one_hot(labels, 8).float(), 4000) - 8) < 1e-6
    assert sample.inception_score(F.one_hot(labels.sort().values, 8).float(), 1000) < 1.01   # why the order is random
    assert torch.bincount(labels).eq(1000).all() and not torch.equal(labels[:8], torch.arange(8))

def test_precision_of_one_real_image_over_and_over_is_1_and_its_recall_0():
    pixels = np.random.RandomState(0).randint(0, 255, (40, 4, 4, 3), dtype=np.uint8)
    network = lambda x: (x.float().mean((2, 3)), torch.ones(len(x), 2) / 2)
    one = torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2) / 127.5 - 1
    decoder = mock.Mock(batch=9, decode=lambda tokens: one.expand(len(tokens), -1, -1, -1))
    row = sample.inception_metrics(lambda cond, rngs: cond, decoder, torch.arange(12), network,
                                   dict(mu=np.zeros(3), sigma=np.eye(3), arr_0=pixels), 0, 5, 'cpu')
    assert row['precision'] == 1 and row['recall'] == 0

class Inception(torch.nn.Module):
    """A stand-in with the signature of the published TorchScript network."""
    def __init__(self):
        super().__init__()
        self.register_buffer('w', torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        h = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 64
        return h if return_features else (h @ self.w).softmax(1)

def test_published_teachers_go_through_distillation_gan_sampling_and_metrics(tmp_path):
    torch.jit.script(Inception()).save(f'{tmp_path}/inception.pt')
    real = np.random.RandomState(0).randint(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    rows = Inception()(torch.from_numpy(real).permute(0, 3, 1, 2), return_features=True).double().numpy()
    np.savez(f'{tmp_path}/ref.npz', mu=rows.mean(0), sigma=np.cov(rows.T), arr_0=real)
    np.savez(f'{tmp_path}/bare.npz', mu=rows.mean(0), sigma=np.cov(rows.T))
    ask = ['--metrics', '--n_metrics=30', f'--inception={tmp_path}/inception.pt']
    digest = hashlib.sha256(open(f'{tmp_path}/inception.pt', 'rb').read()).hexdigest()
    for kind in ('maskgit', 'maskbit'):
        folder = f'{tmp_path}/{kind}'
        os.makedirs(folder)
        torch.save(published(mini(kind), kind), f'{folder}/net.pth')
        torch.save(published(mini_tokenizer(kind), kind), f'{folder}/tokenizer.ckpt')
        files = [f'--teacher={kind}', f'--teacher_path={folder}/net.pth', f'--tokenizer_path={folder}/tokenizer.ckpt']
        text = must_run('distill.py', *files, f'--out_dir={folder}', '--steps=4', '--cfg_scale=2', '--aux_muon=0')
        assert '--inception=FILE' in text and os.path.exists(f'{folder}/distill-000004.png')
        student = torch.load(f'{folder}/distill.pt', weights_only=True)
        assert set(student['tokenizer']) == {'kind', 'path', 'grid', 'S', 'digest'}  # not its weights
        for k in range(student['args']['n_words']):                        # names as ImageNet's
            os.makedirs(f'{folder}/data/n0144{k}')
            Image.fromarray(real[k]).save(f'{folder}/data/n0144{k}/x.png')
        text = must_run('gan.py', *files, f'--out_dir={folder}', f'--data={folder}/data', '--flips', '--steps=4')
        assert 'gan, 1 step' in text and f'{2 * student["args"]["n_words"]} real images' in text
        must_run('sample.py', f'--ckpt={folder}/distill.pt', '--metrics', '--n_metrics=8', f'--data={folder}/data')
        text = must_run('sample.py', f'--ckpt={folder}/distill.pt', *ask, f'--ref={tmp_path}/ref.npz', '--batch=7')
        assert 'FID@30 ' in text and 'FID ' not in text and digest in text and 'precision' in text
        again = must_run('sample.py', f'--ckpt={folder}/distill.pt', *ask, f'--ref={tmp_path}/bare.npz',
                         processes=dict(maskgit=1, maskbit=2)[kind])
        assert 'no precision and recall' in again
        value = lambda text: float(re.search(r'FID@30 ([\d.]+)', text)[1])
        assert abs(value(text) - value(again)) < 1e-3 * value(text)         # neither batch nor processes matter
        option, passes = dict(maskgit=('--student', 1), maskbit=('--steps=4', 7))[kind]
        text = must_run('sample.py', *files, '--label=3', '--n=2', f'--grid={folder}/x.png', option)
        assert f'{passes} network pass' in text and os.path.exists(f'{folder}/x.png')
    os.rename(f'{folder}/tokenizer.ckpt', f'{tmp_path}/moved.ckpt')
    exits_with(lambda: T.Tokenizer.from_checkpoint(student['tokenizer']), 'tokenizer.ckpt', '--tokenizer_path')
    T.Tokenizer.from_checkpoint(student['tokenizer'], f'{tmp_path}/moved.ckpt')

def test_a_published_size_is_timed_without_any_file():
    small = '''
import sys
sys.path.insert(0, '.')
import model, tokenizer
model.PUBLISHED['maskgit'].update(N=16, V=32, D=32, depth=3, n_head=2, n_words=10, mlp=64)
tokenizer.PUBLISHED['maskgit'].update(image_size=16, ch=32, ch_mult='1,1,2', n_res=1, n_codes=32, code_dim=8, z=8, up=1)
'''
    for script in ('distill.py', 'gan.py'):
        assert 'ms_per_step' in must_run(script, '--bench', '--teacher=maskgit', '--teacher_path=random', before=small)
    text = must_run('sample.py', '--bench', '--teacher=maskgit', '--teacher_path=random', '--batch=4', before=small)
    assert 'steps 16, passes 31, batch 4, images_per_s' in text

def test_a_published_teacher_is_asked_for_politely(tmp_path):
    exits_with(lambda: M.load_teacher('maskgit', ''), '--teacher_path=FILE', '--tokenizer_path=FILE')
    for kind in ('maskgit', 'maskbit'):
        torch.save(published(mini(kind), kind), f'{tmp_path}/{kind}.pth')
        torch.save(published(mini_tokenizer(kind), kind), f'{tmp_path}/{kind}.ckpt')
    load = lambda kind, net, tok, data='': lambda: M.load_teacher(kind, f'{tmp_path}/{net}', f'{tmp_path}/{tok}', data)
    exits_with(load('maskgit', 'maskbit.pth', 'maskgit.ckpt'), 'maskbit.pth')
    exits_with(load('maskgit', 'maskgit.pth', 'none.ckpt'), 'none.ckpt: no such file')
    torch.save(published(mini_tokenizer('maskgit', n_codes=64), 'maskgit'), f'{tmp_path}/other.ckpt')
    exits_with(load('maskgit', 'maskgit.pth', 'other.ckpt'), 'maskgit.pth', 'expected V + K + 2 with V = 64')
    torch.save(published(mini_tokenizer('maskbit', code_dim=5, n_codes=32), 'maskbit'), f'{tmp_path}/other.ckpt')
    exits_with(load('maskbit', 'maskbit.pth', 'other.ckpt'), 'of 32', 'not of one release')
    for k, (kind, sizes, codes) in enumerate((('maskgit', dict(V=48, n_words=10), dict(n_codes=48)), (
            'maskbit', dict(N=16, V=16, bits=4, S=1), dict(code_dim=4, S=1, n_codes=16)))):
        torch.save(published(mini(kind, **sizes), kind), f'{tmp_path}/net{k}.pth')    # sizes that one file leaves open
        torch.save(published(mini_tokenizer(kind, **codes), kind), f'{tmp_path}/tok{k}.ckpt')
        found = M.load_teacher(kind, f'{tmp_path}/net{k}.pth', f'{tmp_path}/tok{k}.ckpt', n_head=2)
        assert (found['args']['V'], found['args']['n_head']) == (sizes['V'], 2)
        assert T.Tokenizer.from_checkpoint(found['tokenizer']).S == sizes.get('S', 1)
    picture_folder(f'{tmp_path}/data')
    exits_with(load('maskgit', 'maskgit.pth', 'maskgit.ckpt', f'{tmp_path}/data'), '2 class folders', '10 classes')
    exits_with(lambda: sample.load_inception(f'{tmp_path}/maskgit.pth', 'cpu'), 'maskgit.pth', 'TorchScript')


# -----------------------------------------------------------------------------
# Rewards and test-time optimisation

RED = 'a red circle'

def test_a_reward_is_differentiable_down_to_the_logits_caches_its_text_and_rises_on_one_step():
    judge = M.world_reward(f'{tiny_run()[0]}/rewards.pt', 'clip', 'cpu')
    images, prompts = torch.rand(3, 3, 32, 32) * 2 - 1, [RED, 'a blue square', RED]
    images.requires_grad_()
    with mock.patch.object(M, 'word_ids', wraps=M.word_ids) as asked:
        value = judge(images, prompts)
        judge(images, prompts)
    assert sorted(c.args[0][0] for c in asked.call_args_list) == ['a blue square', RED]  # each prompt once
    assert value.shape == (3,) and (value <= 0).all()
    grad, = torch.autograd.grad(value.sum(), images)
    assert torch.isfinite(grad).all() and (grad.flatten(1).norm(dim=1) > 0).all()
    assert (judge(images.detach() + 1e-3 * grad / grad.std(), prompts) > value).all()
    tokenizer, z = T.Tokenizer(32, 8, '1,1,2', 1, 12, 4).eval(), torch.randn(3, 64, 12, requires_grad=True)
    for relax in ('soft', 'gumbel', 'st'):
        grad, = torch.autograd.grad(judge(tokenizer.decode(M.relaxed(z, relax)), prompts).sum(), z)
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, relax

def test_nothing_is_loaded_for_a_weight_of_zero():
    settings = {k: v for k, v in vars(reward).items() if k.startswith('w_') or k.endswith('_path')}
    assert M.load_rewards({**settings, 'w_clip': 0.0}, 'no.pt', 'cpu') == {}
    exits_with(lambda: M.load_rewards(settings, 'no.pt', 'cpu'), 'no.pt', 'python reward.py')
    loaded = M.load_rewards({**settings, 'w_clip': 2.0}, f'{tiny_run()[0]}/rewards.pt', 'cpu')
    assert list(loaded) == ['clip'] and loaded['clip'][0] == 2.0
    asked = torch.zeros(1, 3, 32, 32), [RED]
    total = M.reward_sum({**loaded, 'b': (3.0, lambda images, prompts: torch.ones(1))}, *asked)
    assert torch.allclose(total, 2 * loaded['clip'][1](*asked) + 3)
    with mock.patch.dict(sys.modules, transformers=None):
        exits_with(lambda: M.load_rewards({**settings, 'w_clip': 0.0, 'w_pick': 1.0}, '', 'cpu'),
                   'pip install transformers')

def test_mixed_tokens_harm_by_their_weight():
    torch.manual_seed(0)
    ids, other = torch.randint(12, (64, 16)), torch.randint(12, (64, 16))
    probs = reward.mixed(ids, other, 12, torch.Generator().manual_seed(0))
    assert torch.allclose(probs.sum(-1), torch.ones(64, 16)) and probs.shape == (64, 16, 12)
    kept = (probs.gather(-1, ids[..., None]) > 0.999).float().mean()
    assert 0.4 < kept < 0.95                                                 # elsewhere than in the boxes
    assert reward.damage(torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)) == 1

def test_rewards_are_ramped_in_limited_and_added_to_the_surrogate(tmp_path):
    inner, kept = inside('reward.py', '--steps=1', f'--out_dir={ready_for("reward.py", tmp_path)}'), []
    fixed = dict(rng_for=lambda *_: torch.Generator().manual_seed(0), finish=lambda k: torch.zeros(()), steps=8)
    for step in (0, 3):                                                      # the weight rises over the ramp
        with mock.patch.dict(inner, fixed, step=step, ramp=1.0, image_clip=1e-4):
            kept.append(inner['update']()[0]['grad_reward'])
    assert torch.isclose(4 * kept[0], kept[1]) and inner['generator'].pos_emb.grad[:, :64].norm() < 1.01e-4
    with mock.patch.dict(inner, fixed, dimo_grad=lambda z, *_: torch.full_like(z, 2), image_clip=0,
                         reward_sum=lambda _, x, c: 0 * x.sum((1, 2, 3)),
                         surrogate=lambda z, grad: kept.append(grad) or (0 * z).sum()):
        inner['update']()
    assert (kept[-1] == 2 * reward.w_dimo).all()

def test_reward_models_learn_that_broken_images_show_nothing():
    source, tokenizer, scores = T.Images('shapes', 32, 64), T.Tokenizer(32, 8, '1,1,2', 1, 12, 4).eval(), []
    images, captions = source.batch(range(64))
    for harm in (0.0, 1.0):
        with mock.patch.multiple(reward, damage=lambda x, y: torch.full((len(x),), harm), reward_steps=15,
                                 reward_batch=16, n_wrong=1, reward_lr=5e-3):
            net = reward.train_reward('conv', source, tokenizer, list(T.WORDS), 8, 0, torch.device('cpu'))
        scores.append(net.score(net.image_features(images), net.text_features(T.word_ids(captions, T.WORDS, 8))).mean())
    assert scores[0] > -0.8 and scores[1] < -5                               # log P of true captions

def test_reward_alone_raises_the_reward_and_a_held_out_turn_ends_the_run(tmp_path):
    folder = ready_for('reward.py', tmp_path)
    must_run('reward.py', f'--out_dir={folder}', '--w_dimo=0', '--warmup=0')
    start, end = (torch.load(f'{folder}/{stage}.pt') for stage in ('distill', 'reward'))
    cond, means = start['prompts'][:200].long(), []
    captions = [' '.join(T.WORDS[k] for k in row if k < len(T.WORDS)) for row in cond.tolist()]
    judge = M.world_reward(f'{folder}/rewards.pt', 'clip', 'cpu')
    tokenizer = T.Tokenizer.from_checkpoint(start['tokenizer'])
    for generator in (network(start), network(end, 'net')):
        logits, _ = M.one_step(generator, cond, 0.9, 0.03, rng=torch.Generator().manual_seed(0))
        means.append(judge(tokenizer.decode(logits.softmax(-1)), captions).mean().item())
    print(f'    reward {means[0]:.4f} -> {means[1]:.4f}')
    assert means[1] > means[0]
    assert not reward.has_turned([], 3) and not reward.has_turned([1, 5, 4, 3], 3) and not reward.has_turned([9, 1], 0)
    assert reward.has_turned([1, 5, 4, 3, 4.9], 3) and not reward.has_turned([1, 5, 4, 3, 6], 3)

def climb(emb, **options):
    """A toy ascent: the image is a slice of the embedding, its score a parabola with the top at 1."""
    draw = lambda e: (e[:, :, :1, None],) * 2
    score = lambda x: -(x - 1).flatten(1).square().sum(1)
    return list(tteo.ascend(emb, draw, score, **{**dict(iterations=6, lr=0.2, clip=0.0, pull=0.0), **options}))

def test_tteo_keeps_the_best_iterate_from_the_first_on():
    emb = torch.randn(5, 4, 3)
    for lr in (0.2, 50.0):                                                   # the second overshoots at once
        rows = climb(emb, lr=lr)
        kept = torch.stack([r[1] for r in rows])
        assert len(rows) == 7 and torch.equal(kept, torch.stack([r[0] for r in rows]).cummax(0).values)
        assert torch.equal(-(rows[-1][2] - 1).flatten(1).square().sum(1), kept[-1])  # the image that has this score
        assert (rows[-1][1] > rows[0][0]).all() or lr > 1
    alone = torch.cat([climb(emb[k:k + 1])[-1][2] for k in range(5)])
    assert torch.equal(alone, climb(emb)[-1][2])                             # whatever the batch
    assert (climb(emb, pull=5.0)[-1][3] < climb(emb)[-1][3]).all()
    assert (climb(emb, clip=0.1)[1][3] <= 0.2 * 0.1 + 1e-6).all()

def test_best_of_n_costs_what_tteo_costs():
    assert tteo.passes_of(0, 'soft') == 1 and tteo.passes_of(10, 'soft') == 31 and tteo.passes_of(10, 'tokens') == 41
    assert tteo.passes_of(8, 'soft', starts=4) == 29

def test_tteo_writes_its_table_curve_and_grid():
    folder, files = tiny_run()[0], {}
    for name, more in (('t2', ['--batch=2']), ('t100', []), ('tokens', ['--output=tokens'])):
        text = must_run('tteo.py', f'--ckpt={folder}/reward.pt', '--iterations=2', '--starts=2', '--n=5', *more,
                        f'--name={folder}/{name}')
        assert 'TTEO, 2 x 2 steps' in text and 'seeds (0, 0..4)' in text
        files[name] = json.load(open(f'{folder}/{name}.json'))
        assert all(os.path.exists(f'{folder}/{name}{k}.png') for k in ('', '-curve'))
    assert 'tokens output' in text and 'best of 11' in text
    assert [r['passes'] for r in files['tokens']['trajectory']] == [3, 7, 11]
    rows, control = files['t100']['trajectory'], files['t100']['best_of']
    kept = [r['kept'] for r in rows]
    assert kept == sorted(kept) and [r['passes'] for r in rows] == [3, 6, 9]
    assert [r['passes'] for r in files['t100']['table']] == [1, 9, 9]
    assert all(abs(a['kept'] - b) < 1e-3 for a, b in zip(files['t2']['trajectory'], kept))  # whatever the batch
    assert abs(kept[0] - control[1]['kept']) < 1e-6 and control[-1]['passes'] == 9          # the better start
    state = torch.load(f'{folder}/reward.pt')                                # the first draw is what sample.py draws
    captions = T.draw(T.HELD_OUT + 10 ** 6 + np.arange(5))[1]
    cond = T.word_ids(captions, T.WORDS, 8)
    logits, _ = M.one_step(network(state), cond, 0.9, 0.03, rng=M.image_rngs(0, range(5)))
    images = T.Tokenizer.from_checkpoint(state['tokenizer']).decode(logits.softmax(-1))
    value = M.world_reward(f'{folder}/rewards.pt', 'clip', 'cpu')(images, captions).mean()
    assert abs(control[0]['kept'] - value) < 1e-4

def transformers_or_skip():
    try:
        import transformers
        return transformers
    except ImportError:
        raise SkipTest('transformers is not installed (pip install transformers)') from None

def tiny_clip(root):
    """A random CLIP of the published class with a five-word tokenizer, saved in root."""
    t = transformers_or_skip()
    import tokenizers
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_act='gelu')
    words = {w: k for k, w in enumerate(['<pad>', '<start>', '<end>', 'a', 'red', 'circle'])}
    text = dict(vocab_size=6, hidden_size=16, intermediate_size=32, max_position_embeddings=12, bos_token_id=1,
                eos_token_id=2, pad_token_id=0)
    pixels = dict(hidden_size=24, intermediate_size=48, image_size=224, patch_size=112)
    config = t.CLIPConfig(text_config={**text, **sizes}, vision_config={**pixels, **sizes}, projection_dim=8)
    model = t.CLIPModel(config)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single='<start> $A <end>', special_tokens=[('<start>', 1), ('<end>', 2)])
    t.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token='<pad>', eos_token='<end>').save_pretrained(root)
    model.eval().save_pretrained(root)
    return model, torch.tensor([[1, 3, 4, 5, 2] + [0] * 7, [1, 3, 5, 2] + [0] * 8])

def clip_cosine(model, images, ids):
    take = lambda out: F.normalize(getattr(out, 'pooler_output', out), dim=-1)
    f = take(model.get_image_features(pixel_values=M.pixels_224(images)))
    return (f * take(model.get_text_features(input_ids=ids))).sum(-1)

def test_preprocessing_equals_pils_to_a_hundredth():
    for height, width in ((256, 256), (300, 420), (512, 512), (32, 32)):
        y, x = np.mgrid[:height, :width] / 20
        pixels = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x / 3) * np.sin(y)], -1) * 120 + 128
        pixels = pixels.astype(np.uint8)
        size = [224 * s // min(height, width) for s in (width, height)]           # torchvision's Resize
        box = [(s - 224) // 2 for s in size]
        crop = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).crop((*box, box[0] + 224, box[1] + 224))
        ours = M.pixels_224(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0].permute(1, 2, 0)
        ours = ours.numpy() * [0.26862954, 0.26130258, 0.27577711] + [0.48145466, 0.4578275, 0.40821073]
        assert abs(ours - np.asarray(crop) / 255).max() < 0.01 and ours.shape == (224, 224, 3)
    x = (torch.rand(1, 3, 40, 50) * 2 - 1).requires_grad_()
    assert (torch.autograd.grad(M.pixels_224(x).square().sum(), x)[0] != 0).any(1).float().mean() > 0.7

def test_clip_score_and_pickscore_follow_their_formulas(tmp_path):
    images = (torch.rand(2, 3, 40, 40) * 2 - 1).requires_grad_()
    model, ids = tiny_clip(tmp_path)
    cosine = clip_cosine(model, images, ids)
    for kind, scale in (('clipscore', 100), ('pick', model.logit_scale.exp())):
        score = M.clip_reward(kind, tmp_path, tmp_path, 'cpu')(images, [RED, 'a circle'])
        assert torch.allclose(score, scale * cosine, atol=1e-4)
        grad, = torch.autograd.grad(score.sum(), images)
        assert torch.isfinite(grad).all() and grad.abs().max() > 0
    exits_with(lambda: M.clip_reward('pick', f'{tmp_path}/nowhere', tmp_path, 'cpu'), 'cannot load', 'nowhere')
    half = {k: v for k, v in model.state_dict().items() if 'layers.1.mlp' not in k}
    model.save_pretrained(f'{tmp_path}/half', state_dict=half)
    exits_with(lambda: M.clip_reward('pick', f'{tmp_path}/half', tmp_path, 'cpu'), 'half: it has no', 'layers.1.mlp')

def test_hps_is_read_from_open_clip_names(tmp_path):
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    model, ids = tiny_clip(tmp_path)
    state, names = model.state_dict(), {}
    rules = (('vision_model.', 'visual.'), ('text_model.', ''), ('encoder.layers', 'transformer.resblocks'),
             ('embeddings.', ''), ('patch_embedding', 'conv1'), ('position_embedding.weight', 'positional_embedding'),
             ('pre_layrnorm', 'ln_pre'), ('post_layernorm', 'ln_post'), ('final_layer_norm', 'ln_final'),
             ('layer_norm', 'ln_'), ('fc1', 'c_fc'), ('fc2', 'c_proj'), ('self_attn', 'attn'), ('q_proj.', 'in_proj_'),
             ('visual_projection.weight', 'visual.proj'), ('text_projection.weight', 'text_projection'))
    for key, value in state.items():
        if 'q_proj' in key:                                                  # queries, keys and values: one matrix
            value = torch.cat([state[key.replace('q_proj', f'{p}_proj')] for p in 'qkv'])
        if 'k_proj' not in key and 'v_proj' not in key:
            key = functools.reduce(lambda k, rule: k.replace(*rule), rules, key)
            names[key] = value.T if key in ('visual.proj', 'text_projection') else value
    same(dict(sorted(M.from_open_clip(names).items())), dict(sorted(state.items())))
    torch.save({'state_dict': names}, f'{tmp_path}/hps.pt')
    hps = lambda name: M.clip_reward('hps', f'{tmp_path}/{name}.pt', tmp_path, 'cpu')
    assert torch.allclose(hps('hps')(images, [RED, 'a circle']), clip_cosine(model, images, ids), atol=1e-5)
    exits_with(lambda: hps('no'), 'no.pt: no such file', '--hps_path')
    torch.save({'blip.a': torch.ones(1)}, f'{tmp_path}/other.pt')
    exits_with(lambda: hps('other'), "other.pt: it has no 'visual.proj'")
    exits_with(lambda: M.image_reward(f'{tmp_path}/hps.pt', '', 'cpu'), "hps.pt: it has no 'visual.post_layernorm")

def test_imagereward_reads_its_published_names(tmp_path):
    t, images = transformers_or_skip(), (torch.rand(2, 3, 40, 40) * 2 - 1).requires_grad_()
    _, ids = tiny_clip(tmp_path)                                             # only its word tokenizer is used
    text = t.BlipTextModel(t.BlipTextConfig(
        vocab_size=6, hidden_size=24, encoder_hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=12, max_position_embeddings=35, layer_norm_eps=1e-12), add_pooling_layer=False).eval()
    eyes = t.BlipVisionModel(t.BlipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, image_size=224, num_attention_heads=16,
        patch_size=112, layer_norm_eps=1e-6)).eval()
    widths = (24, 10, 9, 8, 7, 1)
    layers = {k: torch.nn.Linear(a, b) for k, a, b in zip('02467', widths, widths[1:])}
    published = {f'mlp.layers.{k}.{e}': v for k, m in layers.items() for e, v in m.state_dict().items()}
    published |= {f'blip.text_encoder.{k}': v for k, v in text.state_dict().items()}
    for key, value in eyes.state_dict().items():
        for a, b in (('embeddings.class_embedding', 'cls_token'), ('embeddings.position_embedding', 'pos_embed'),
                     ('embeddings.patch_embedding', 'patch_embed.proj'), ('encoder.layers', 'blocks'),
                     ('self_attn.projection', 'attn.proj'), ('self_attn', 'attn'), ('layer_norm', 'norm'),
                     ('post_layernorm', 'norm')):
            key = key.replace(a, b)
        published[f'blip.visual_encoder.{key}'] = value
    torch.save({**published, 'blip.vision_proj.weight': torch.ones(1)}, f'{tmp_path}/ImageReward.pt')
    score = M.image_reward(f'{tmp_path}/ImageReward.pt', tmp_path, 'cpu')(images, [RED, 'a circle'])
    ids = torch.cat([ids, torch.zeros(2, 23).long()], 1)
    seen = eyes(pixel_values=M.pixels_224(images)).last_hidden_state
    h = text(ids, attention_mask=(ids > 0).long(), encoder_hidden_states=seen, is_decoder=False)[0][:, 0]
    for layer in layers.values():
        h = layer(h)
    assert torch.allclose(score, (h[:, 0] - 0.16717362830052426) / 1.0333394966054072, atol=1e-4)
    grad, = torch.autograd.grad(score.sum(), images)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


# -----------------------------------------------------------------------------
# Files and errors

def test_bad_checkpoints_are_explained_and_the_one_before_a_broken_one_is_used(tmp_path):
    path, kept = f'{tmp_path}/x.pt', []
    load = lambda **options: T.load_checkpoint(path, 'model|distill', 'Train it.', **options)
    exits_with(load, path, 'no such checkpoint', 'Train it.')
    for step in (1, 2):
        T.save_checkpoint(path, dict(stage='distill', step=step, net=dict(w=torch.ones(1000))))
    whole = open(path, 'rb').read()
    for broken, words in ((whole[:len(whole) // 2], 'truncated or not a checkpoint'),
                          (b'', 'truncated or not a checkpoint'), (b'hello', '')):
        open(path, 'wb').write(broken)
        exits_with(load, path, words, 'Train it.')
        text = printed(lambda: kept.append(load(fallback=True)['step']))
        assert kept.pop() == 1 and words in text and f'using the previous one, {tmp_path}/x.prev.pt' in text
    open(f'{path}.123.prev.tmp', 'w').close()                                    # of a run that was killed
    T.save_checkpoint(path, dict(stage='distill', step=3))
    assert (load()['step'], T.load_checkpoint(f'{tmp_path}/x.prev.pt')['step']) == (3, 1)   # broken: not kept
    assert sorted(os.listdir(tmp_path)) == ['x.prev.pt', 'x.pt']
    for foreign, words in ((dict(weights=torch.ones(3)), 'not a checkpoint of this project'),
                           (dict(stage='tokenizer'), 'is a tokenizer checkpoint, expected model or distill')):
        torch.save(foreign, path)
        exits_with(lambda: load(fallback=True), path, words, 'Train it.')        # whole, so nothing stands in for it
    exits_with(lambda: T.restore(small_model(), small_model(D=12).state_dict(), 'f.pt', 'net'),
               'f.pt: net does not fit', 'tok_emb.weight', 'size mismatch')

def test_resuming_with_other_settings_or_another_tokenizer_is_said(tmp_path):
    path, config = f'{tmp_path}/x.pt', dict(beta=0.1, seed=0, resume=False, out_dir='out')
    T.save_checkpoint(path, dict(stage='distill', step=1, config=config))
    resumed = lambda **changes: printed(lambda: T.load_resumed(path, 'distill', {**config, **changes}))
    assert resumed(resume=True, out_dir='elsewhere') == ''
    assert resumed(beta=0.2) == f'note: {path} continues with --beta=0.2 (it had 0.1)\n'
    for script in ('distill.py', 'gan.py'):
        folder, name = ready_for(script, f'{tmp_path}/{script}'), script.replace('.py', '.pt')
        state = torch.load(f'{tiny_run()[0]}/{name}', weights_only=True)
        state['tokenizer']['net'] = {k: v + 1 for k, v in state['tokenizer']['net'].items()}
        torch.save(state, f'{folder}/{name}')
        must_refuse(script, f'--out_dir={folder}', '--resume', words='different tokenizers')

def test_code_in_a_file_is_never_executed(tmp_path):
    class Bomb:
        def __init__(self, function, argument):
            self.call = function, (argument,)
        def __reduce__(self):
            return self.call
    path, trace = f'{tmp_path}/bomb.pt', f'{tmp_path}/executed'
    for function, argument in ((os.system, f'mkdir {trace}'), (os.mkdir, trace),
                               (subprocess.getoutput, f'mkdir {trace}'), (eval, f'__import__("os").mkdir("{trace}")')):
        torch.save(dict(stage='distill', w=torch.ones(1), bomb=Bomb(function, argument)), path)
        exits_with(lambda: T.load_checkpoint(path), 'refused', 'nothing in it was executed')
        with contextlib.suppress(ValueError):                                   # refused, or read as an empty dict
            T.Tokenizer.from_pretrained('maskgit', path)
        assert not os.path.exists(trace)
        torch.load(path, weights_only=False)
        os.rmdir(trace)                                                         # it was a real one

def test_no_space_or_permission_is_one_line_and_loses_no_checkpoint(tmp_path):
    T.save_checkpoint(path := f'{tmp_path}/x.pt', dict(stage='distill', step=1))
    code = FULL + f'import torch, tokenizer as T\nT.save_checkpoint({path!r}, dict(net=dict(w=torch.ones(9999))))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and done.stderr.startswith(f'cannot write {path}'), done.stderr
    assert T.load_checkpoint(path)['step'] == 1 and os.listdir(tmp_path) == ['x.pt']
    for script in TINY:
        folder = ready_for(script, f'{tmp_path}/{script}')
        must_refuse(script, f'--out_dir={folder}', before=FULL, words=f'cannot write {folder}')
    ask = ['--ckpt', f'{tiny_run()[0]}/distill.pt', f'--grid={tmp_path}/grid.png']
    must_refuse('sample.py', *ask, before=FULL, words=f'cannot write {tmp_path}/grid.png')
    must_refuse('tokenizer.py', f'--out_dir={path}/out', words=f'cannot write {path}/out')  # chmod would not stop root
    exits_with(lambda: T.save_checkpoint(f'{path}/y.pt', {}), 'cannot write', '--out_dir')

def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    for script, name in (('tokenizer.py', 'lr'), ('model.py', 'lr'), ('distill.py', 'generator_lr')):
        folder = ready_for(script, f'{tmp_path}/{script}')
        setting = f'--{name}=1e38'
        must_refuse(script, f'--out_dir={folder}', setting, '--log_every=100', words='is not finite')
        assert not os.path.exists(f'{folder}/{script[:-3]}.pt')
    broken = dict(step=3, net=dict(w=torch.tensor([1.0, float('nan')])))
    exits_with(lambda: T.save_checkpoint(f'{tmp_path}/x.pt', broken), 'not finite at step 3')
    assert not os.path.exists(f'{tmp_path}/x.pt')

def test_a_teacher_and_a_generator_must_share_their_tokenizer(tmp_path):
    a, b = ({'tokenizer': small_tokenizer().pack()} for _ in range(2))
    M.same_tokens(a, b, 'x.pt', 'y.pt')
    b['tokenizer']['net'] = {k: v + 1 for k, v in b['tokenizer']['net'].items()}
    exits_with(lambda: M.same_tokens(a, b, 'x.pt', 'y.pt'), 'x.pt and y.pt', '--teacher_ckpt')
    exits_with(lambda: M.same_tokens(a, {'tokenizer': {'kind': 'maskgit'}}, 'x.pt', 'y.pt'), 'different tokenizers')
    for k, saved in enumerate(packs := [{}, {}]):                                # the same of published ones, by hash
        tokenizer = mini_tokenizer('maskbit')
        torch.nn.init.constant_(tokenizer.decoder.conv_out.weight, k)
        torch.save(published(tokenizer, 'maskbit'), path := f'{tmp_path}/tokenizer.bin')
        saved['tokenizer'] = T.Tokenizer.from_pretrained('maskbit', path, tokenizer.grid).pack()
    M.same_tokens(packs[1], packs[1], 'x.pt', 'y.pt')
    exits_with(lambda: M.same_tokens(*packs, 'x.pt', 'y.pt'), 'different tokenizers')
    T.Tokenizer.from_checkpoint(packs[1]['tokenizer'])
    exits_with(lambda: T.Tokenizer.from_checkpoint(packs[0]['tokenizer']), 'other weights', '--tokenizer_path')

def test_other_optimizers_than_the_saved_ones_are_explained():
    made = lambda rate: M.make_optimizers(small_model(), rate, 1e-3, (0.9, 0.99))
    states = [o.state_dict() for o in made(0.01)]
    states[0]['param_groups'][0]['fused'] = True                                 # as saved on a GPU
    M.restore_optimizers(optimizers := made(0.01), states, 'x.pt')
    assert optimizers[0].param_groups[0]['fused'] is False
    exits_with(lambda: M.restore_optimizers(made(0), states, 'x.pt'), 'x.pt: its optimizers', 'Muon')

def test_ctrl_c_ends_with_one_line():
    with contextlib.redirect_stderr(io.StringIO()) as told:
        T.report_error(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert told.getvalue() == 'stopped\n'

def test_errors_of_the_scripts_are_one_line(tmp_path):
    folder, done = ready_for('distill.py', tmp_path), tiny_run()[0]
    teacher = ('sample.py', f'--ckpt={done}/model.pt')
    cases = [(('distill.py', '--batchsize=3'), 'unknown setting --batchsize; did you mean --batch_size?'),
             (('distill.py', '--micro_batch=3'), 'batch_size 8 is not a multiple of 1 process(es) x 3'),
             (('distill.py', '--teacher_ckpt=no.pt'), 'no.pt: no such checkpoint'),
             (('distill.py', f'--teacher_ckpt={folder}/tokenizer.pt'), 'is a tokenizer checkpoint'),
             (('distill.py', f'--out_dir={folder}', '--resume'), 'Start without --resume'),
             (('gan.py', f'--out_dir={folder}'), 'distill.pt: no such checkpoint'),
             (('gan.py', f'--init={done}/model.pt'), 'expected distill or gan or reward'),
             (('tokenizer.py', '--ch_mult=1,1,1,1,1,1,1'), 'image_size 32 is not a multiple of 64'),
             (('tokenizer.py', '--ch_mult=0,1'), 'a level without channels'),
             (('tokenizer.py', '--lr=-1'), 'Invalid learning rate: -1'),
             (('model.py', f'--out_dir={folder}', '--n_head=5'), 'not a multiple of n_head'),
             (('model.py', f'--out_dir={folder}', '--lr=-1'), 'Invalid learning rate: -1'),
             ((*teacher, '--prompt', 'a purple circle'), "unknown word 'purple'"),
             ((*teacher, '--label=cat'), '--prompt'),
             ((*teacher, '--steps=99'), 'more than the 64 tokens'),
             ((*teacher, '--metrics', '--n_metrics=2'), '--n_metrics'),
             ((*teacher, '--metrics', '--prompt', 'a circle'), 'leave out --prompt'),
             (('sample.py', f'--ckpt={done}/distill.pt', '--steps=4'), 'is a one-step generator'),
             (('sample.py', f'--ckpt={done}/distill.pt', '--sweep'), 'is a one-step generator'),
             (('reward.py', f'--out_dir={done}', '--w_clip=0'), 'every reward has weight 0'),
             (('reward.py', f'--out_dir={done}', '--reward_steps=4'), 'rewards.pt: made in 3 steps'),
             (('tteo.py', f'--ckpt={done}/reward.pt', '--prompt', 'a purple circle'), "unknown word 'purple'")]
    for arguments, words in cases:
        must_refuse(*arguments, words=words)


# -----------------------------------------------------------------------------
# The repository

def test_scripts_import_only_what_the_design_allows():
    allowed = {'torch', 'numpy', 'tqdm', 'PIL', 'scipy', *sys.stdlib_module_names}
    ours = {'tokenizer.py': set(), 'model.py': {'tokenizer', 'transformers'}}
    for path in set(glob.glob(f'{HERE}/*.py')) - {os.path.abspath(__file__)}:
        name, tree = os.path.basename(path), ast.parse(open(path, encoding='utf-8').read())
        found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
        here = ours.get(name, {'tokenizer', 'model'})
        assert {f.split('.')[0] for f in found} <= allowed | here, (name, found)

def test_readme_points_at_the_right_lines():
    path = f'{HERE}/README.md'
    table = open(path, encoding='utf-8').read().split('<!-- equations -->')[1].split('<!-- end -->')[0]
    rows = re.findall(r'`(\w+\.py):(\d+)` +\| +`([^`]+)`', table)
    assert len(rows) == table.count('\n| ') - 1 >= 10
    for name, line, text in rows:
        lines = open(f'{HERE}/{name}', encoding='utf-8').read().splitlines()
        assert text in lines[int(line) - 1], (name, line, text)


# -----------------------------------------------------------------------------

def attempt(name):
    """Run one test -> (outcome, seconds, reason or traceback)."""
    torch.manual_seed(0)
    clock, outcome, note, test = time.time(), 'passed', '', globals()[name]
    try:
        with tempfile.TemporaryDirectory() as folder:                            # pytest's tmp_path
            test(*[pathlib.Path(folder) for _ in inspect.signature(test).parameters])
    except SkipTest as reason:
        outcome, note = 'skipped', f': {reason}'
    except (Exception, SystemExit):
        outcome, note = 'failed', '\n' + traceback.format_exc()
    return outcome, time.time() - clock, note


if __name__ == '__main__':
    words, counts, started = sys.argv[1:], dict(passed=0, failed=0, skipped=0), time.time()
    names = [n for n, f in globals().items() if n.startswith('test_') and inspect.isfunction(f)]
    names = [n for n in names if not words or any(w in n for w in words)]
    if not names:
        sys.exit(f'test_all.py: no test has {" or ".join(words)} in its name; give parts of names, or nothing for all')
    workers, fork = min(2, os.cpu_count()), multiprocessing.get_context('fork')  # each trains a tiny run of its own
    with tempfile.TemporaryDirectory() as tempfile.tempdir, ProcessPoolExecutor(workers, fork) as pool:
        for name, (outcome, seconds, note) in zip(names, pool.map(attempt, names)):
            counts[outcome] += 1
            print(f'{outcome:8s}{seconds:6.1f} s  {name}{note}', flush=True)
    print(f'{time.time() - started:.0f} seconds')
    print(f'{counts["passed"]} passed, {counts["failed"]} failed, {counts["skipped"]} skipped')
    sys.exit(counts['failed'] > 0)
