"""
The claims of this repository, as tests: plain functions, on a CPU, with tiny networks, in a few minutes.

$ python test_all.py                 # all of them, ends with "N passed, M failed, K skipped"
$ python test_all.py resume soft     # those with one of these words in their name
$ pytest test_all.py                 # the same, if you have pytest
Set GOLDEN to a folder of golden files to compare with published layouts; such tests skip where it is unset.
"""
import ast
import copy
import glob
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import distill
import model as M
import sample
import tokenizer as T

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = {'tokenizer.py': '--ch=8 --ch_mult=1,1,2 --n_codes=32 --steps=12 --warmup_free=4 --batch_size=8 --save_every=4 --log_every=2',
        'model.py': '--D=32 --depth=2 --n_head=2 --steps=8 --batch_size=8 --n_images=256 --save_every=4 --log_every=2',
        'distill.py': '--steps=12 --batch_size=8 --save_every=4 --log_every=2 --n_eval=40 --teacher_steps=3'}


class Skip(Exception):
    """Raised by a test that cannot run here, with the reason."""


def run(script, *arguments, processes=1, **options):
    """Run one of our scripts with its tiny settings -> (exit code, output)."""
    launch = [sys.executable] if processes == 1 else [
        sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', f'--master_port={random.randint(20000, 60000)}']
    command = launch + [os.path.join(HERE, script)] + TINY.get(script, '').split() + list(arguments)
    env = dict(os.environ, OMP_NUM_THREADS='1', **options.pop('env', {}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=HERE, **options)
    return done.returncode, done.stdout + done.stderr


def must_run(*arguments, **options):
    code, text = run(*arguments, **options)
    assert code == 0, f'{arguments} failed:\n{text[-3000:]}'
    return text


SHARED = {}


def tiny_run():
    """A folder with a tiny tokenizer and teacher, made once: the data path of every test below."""
    if 'folder' not in SHARED:
        SHARED['keep'] = tempfile.TemporaryDirectory()
        folder = os.path.join(SHARED['keep'].name, 'out')
        must_run('tokenizer.py', f'--out_dir={folder}')
        must_run('model.py', f'--out_dir={folder}')
        SHARED['folder'] = folder
    return SHARED['folder']


def copy_of_tiny_run(folder):
    os.makedirs(folder)
    for name in os.listdir(tiny_run()):
        if name.endswith(('.pt', '.npy')):
            os.link(os.path.join(tiny_run(), name), os.path.join(folder, name))
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b, where=''):
    """Two nested containers of tensors are equal bit for bit."""
    assert type(a) is type(b), (where, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b)):
            same(*pair, f'{where}[{k}]')
    else:
        assert a == b, (where, a, b)


def exits_with(call, *words):
    """`call` ends with SystemExit or ValueError whose one line contains every word."""
    try:
        call()
    except (SystemExit, ValueError) as error:
        text = str(error)
        assert '\n' not in text and all(w in text for w in words), f'{text!r} lacks one of {words}'
        return text
    raise AssertionError(f'no error, expected one with {words}')


def small_model(**changes):
    torch.manual_seed(0)
    model = M.MDM(**dict(dict(N=16, V=12, D=24, depth=2, n_head=2, n_words=5, T=3), **changes))
    for p in model.parameters():                       # away from the zeros and ones of the start
        p.data += 0.1 * torch.randn(p.shape)
    return model.eval()


def small_tokenizer():
    torch.manual_seed(0)
    return T.Tokenizer(image_size=16, ch=8, ch_mult='1,1,2', n_res=1, n_codes=12, code_dim=4).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# Overrides

def settings():
    return dict(__file__=os.path.join(HERE, 'sample.py'), __doc__='x', lr=0.1, steps=10, note='', flag=False, batch_size=8, CONSTANT=1)


def test_overrides_take_every_documented_form():
    def given(*argv):
        g = settings()
        assert T.configure(g, list(argv)) == {k: g[k] for k in ('lr', 'steps', 'note', 'flag', 'batch_size')}
        return g
    assert given('--lr=1')['lr'] == 1.0 and isinstance(given('--lr=1')['lr'], float)
    assert given('--steps=1e5')['steps'] == 100000 and isinstance(given('--steps=1e5')['steps'], int)
    assert given('--note=123')['note'] == '123' and given('--note=a=b')['note'] == 'a=b'
    assert given('--flag')['flag'] is True and given('--flag=False')['flag'] is False and given('--flag', '0')['flag'] is False
    assert given('--flag', '--lr', '2')['lr'] == 2.0 and given('--lr', '-0.2')['lr'] == -0.2
    assert given('--batch-size', '4')['batch_size'] == 4 and given()['lr'] == 0.1


def test_overrides_refuse_with_one_line():
    bad = lambda *argv: lambda: T.configure(settings(), list(argv))
    exits_with(bad('--batchsize=3'), 'unknown setting --batchsize', 'did you mean --batch_size?')
    exits_with(bad('--CONSTANT=3'), 'unknown setting')
    exits_with(bad('--steps=1.5'), 'int', 'default 10', "'1.5'")
    exits_with(bad('--flag=maybe'), 'true, false, 1 or 0', "'maybe'")
    exits_with(bad('--lr=fast'), 'float', "'fast'")
    exits_with(bad('--lr'), 'needs a value')
    exits_with(bad('lr=3'), 'stray word', '--name=value')
    exits_with(bad('-lr', '3'), 'stray word')


def test_help_prints_the_block():
    for script in ('tokenizer.py', 'model.py', 'distill.py', 'sample.py'):
        code, text = run(script, '--help')
        assert code == 1 and 'seed = 0' in text and 'python ' + script in text, text[-500:]


def test_batch_must_divide():
    assert T.split_batch(32, 0, 2) == (16, 1) and T.split_batch(32, 8, 2) == (8, 2)
    exits_with(lambda: T.split_batch(100, 16, 8), 'batch_size 100', '8 process(es) x 16 per process = 128', '--batch_size=128')


# -----------------------------------------------------------------------------
# The shapes world

def test_image_i_is_the_same_on_every_machine():
    images, captions = T.draw(range(64))
    pixels = ((images + 1) * 127.5).round().byte().numpy().tobytes()
    digest = hashlib.sha256(pixels + '\n'.join(captions).encode()).hexdigest()
    assert digest[:16] == '1cf32c4b843e91be', digest
    again, names = T.draw([5, 63, 5])
    assert torch.equal(again[1], images[63]) and torch.equal(again[0], again[2]) and names[0] == captions[5]


def test_drawing_10000_images_takes_seconds():
    start = time.time()
    images, captions = T.draw(range(10_000))
    seconds = time.time() - start
    print(f'    10,000 images in {seconds:.1f} s')
    assert seconds < 60 and images.shape == (10_000, 3, 32, 32) and -1 <= images.min() and images.max() <= 1
    assert set(' '.join(captions).split()) == set(T.WORDS)                     # every word is used, none is unknown
    assert T.word_ids(captions, T.WORDS, T.CAPTION_LENGTH).shape == (10_000, 8)


def test_checker_accepts_real_images_and_rejects_wrong_ones():
    images, captions = T.draw(range(T.HELD_OUT, T.HELD_OUT + 3000))
    wrong = [T.wrong_caption(c, u) for c, u in zip(captions, np.random.RandomState(0).rand(3000))]
    tasks = np.array([T.parse_caption(c)[0] for c in captions])
    right, accepted = T.check(images, captions), T.check(images, wrong)
    for task in T.TASKS:
        at = tasks == task
        print(f'    {task:14s} real {right[at].mean():.3f}  wrong accepted {accepted[at].mean():.3f}  ({at.sum()} images)')
        assert at.sum() > 300 and right[at].mean() >= 0.95 and accepted[at].mean() <= 0.05
    empty = torch.full((1, 3, 32, 32), -0.8)
    assert not T.check(empty, ['a red circle'])[0] and not T.check(torch.zeros(1, 3, 32, 32), ['a shape'])[0]


def test_factors_see_a_dropped_mode():
    images, captions = T.draw(range(T.HELD_OUT, T.HELD_OUT + 3000), open_background=True)
    truth = T.factors(images, captions, 'shapes-open')
    print('    real renders: ' + ', '.join(f'{k} {v:.3f}' for k, v in truth.items()))
    assert max(truth.values()) < 0.06
    found = T.look(images)
    for factor in ('size', 'color', 'shape', 'row'):                           # keep images with one value only
        value = found[factor] if factor != 'row' else found['row'] // 16
        drop = np.unique(found['image'][value != value.min()])
        keep = np.setdiff1d(np.arange(3000), drop)
        rest = T.factors(images[keep], [captions[k] for k in keep], 'shapes-open')
        assert rest['position' if factor == 'row' else factor] > 0.4, (factor, rest)
    keep = np.flatnonzero(found['background'] == 1)
    assert T.factors(images[keep], [captions[k] for k in keep], 'shapes-open')['background'] > 0.7


def test_toy_features_react_to_every_factor():
    reference = M.toy_features(T.draw(range(T.HELD_OUT, T.HELD_OUT + 3000))[0])
    index = range(T.HELD_OUT + 3000, T.HELD_OUT + 5000)
    images, captions = T.draw(index)
    distance = lambda x: M.frechet_distance(M.toy_features(x), reference)
    floor = distance(images)
    small = np.array([(T.look(images[k:k + 1])['size'] == 0).all() for k in range(1000)])
    no_circle = torch.from_numpy(np.flatnonzero(['circle' not in c for c in captions]))
    changed = dict(moved_4=torch.roll(images, 4, 3), moved_1=torch.roll(images, 1, 3), recoloured=images[:, [1, 0, 2]],
                   background=T.draw(index, True)[0], small_only=images[:1000][torch.from_numpy(small)],
                   no_circles=images[no_circle], blurred=F.avg_pool2d(images, 3, 1, 1))
    rows = {name: distance(x) for name, x in changed.items()}
    print(f'    real {floor:.2f}, ' + ', '.join(f'{k} {v:.1f}' for k, v in rows.items()))
    assert all(v > 1.5 * floor for v in rows.values())


def test_captions_are_parsed_and_bad_ones_explained():
    assert T.parse_caption('a red circle left of a blue square') == ('position', [('red', 'circle'), ('blue', 'square')], 'left of')
    assert T.parse_caption('three green squares') == ('counting', [('green', 'square')] * 3, '')
    assert T.parse_caption('a circle')[0] == 'single_object' and T.parse_caption('a yellow shape')[1] == [('yellow', '')]
    exits_with(lambda: T.parse_caption('a red red'), 'outside the grammar')
    exits_with(lambda: T.word_ids(['a red cirle'], T.WORDS, 8), "'cirle'", 'circle')
    exits_with(lambda: T.word_ids(['a a a a a a a a a'], T.WORDS, 8), '9 words', 'at most 8')


# -----------------------------------------------------------------------------
# Folders of images

def picture_folder(root):
    """Twelve good images of every mode in two classes, and two bad files."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 56, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    for name in ('cat', 'dog'):
        os.makedirs(f'{root}/{name}')
    rgb.save(f'{root}/cat/a.png'); rgb.save(f'{root}/dog/b.jpg')
    rgb.convert('L').save(f'{root}/cat/grey.png'); rgb.convert('P').save(f'{root}/cat/palette.png')
    rgb.convert('CMYK').save(f'{root}/dog/cmyk.jpg'); rgb.convert('1').save(f'{root}/dog/bits.png')
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(f'{root}/dog/grey16.png')
    rgba = rgb.convert('RGBA'); rgba.putalpha(0); rgba.save(f'{root}/dog/alpha.png')
    rgb.convert('LA').save(f'{root}/dog/la.png')
    rgb.convert('P').save(f'{root}/cat/clear.png', transparency=0); rgb.resize((1, 1)).save(f'{root}/cat/dot.png')
    rgb.resize((300, 20)).save(f'{root}/cat/wide.png')
    data = open(f'{root}/cat/a.png', 'rb').read()
    open(f'{root}/cat/truncated.png', 'wb').write(data[:len(data) // 2])
    open(f'{root}/dog/notes.txt', 'w').write('not an image')


def test_folder_reads_every_mode_and_names_bad_files():
    with tempfile.TemporaryDirectory() as root:
        picture_folder(root)
        images = T.Images(root, 16)
        assert images.words == ('cat', 'dog') and images.length == 14 and images.caption_length == 1
        pixels, captions = images.batch(range(14), substitute=False)
        assert pixels.shape == (12, 3, 16, 16) and captions.count('cat') == 6
        assert sorted(os.path.basename(p) for p in images.bad) == ['notes.txt', 'truncated.png']
        alpha = [k for k, (path, _) in enumerate(images.files) if path.endswith('alpha.png')]
        assert images.batch(alpha)[0].min() == 1.0                             # fully transparent shows white
        grey, grey16 = (T.read_image(f'{root}/{name}', 16) for name in ('cat/grey.png', 'dog/grey16.png'))
        assert abs(grey16.astype(int) - np.asarray(Image.open(f'{root}/cat/a.png'))[..., 0].mean()).mean() < 40
        assert grey.shape == (16, 16, 3)
        full, _ = images.batch(range(14))                                      # bad files replaced by the next good one
        assert full.shape[0] == 14 and images.key() != T.Images(root, 32).key()


def test_folder_problems_are_explained():
    with tempfile.TemporaryDirectory() as root:
        exits_with(lambda: T.Images(f'{root}/nowhere', 32), 'no such folder')
        exits_with(lambda: T.Images(root, 32), 'no files found', 'sub-folders')
        open(f'{root}/x.txt', 'w').write('x')
        exits_with(lambda: T.Images(root, 32).batch([0]), 'not one of its 1 files')
        Image.new('RGB', (8, 8)).save(f'{root}/y.png')
        assert T.Images(root, 32).words == ('image',)                           # a flat folder is one class, with a note
        exits_with(lambda: T.Images('shapes', 64), '32 pixels')


def test_token_cache_is_never_stale():
    with tempfile.TemporaryDirectory() as root:
        picture_folder(f'{root}/data')
        tokenizer, device = small_tokenizer(), torch.device('cpu')
        first = T.token_data(T.Images(f'{root}/data', 16), tokenizer, root, device)
        assert isinstance(first, np.memmap) and first.shape == (12, 17)
        T.token_data(T.Images(f'{root}/data', 16), tokenizer, root, device)
        assert len(glob.glob(f'{root}/tokens-*.npy')) == 1                      # used again
        Image.new('RGB', (20, 20), 'red').save(f'{root}/data/dog/new.png')
        assert len(T.token_data(T.Images(f'{root}/data', 16), tokenizer, root, device)) == 13
        tokenizer.codebook.weight.data += 1
        T.token_data(T.Images(f'{root}/data', 16), tokenizer, root, device)
        assert len(glob.glob(f'{root}/tokens-*.npy')) == 3                      # new image, new weights: new caches


# -----------------------------------------------------------------------------
# Tokenizer

def test_soft_decode_of_one_hot_is_the_hard_decode():
    tokenizer = small_tokenizer()
    ids = torch.randint(12, (3, 16))
    hard, soft = tokenizer.decode(ids), tokenizer.decode(F.one_hot(ids, 12).float())
    assert torch.equal(hard, soft) and hard.shape == (3, 3, 16, 16)
    assert tokenizer.encode(hard).shape == (3, 16)
    exits_with(lambda: tokenizer.decode(torch.zeros(1, 16, 11)), '(B, 16, 12)')


def test_soft_decode_gradient_matches_finite_differences():
    tokenizer = small_tokenizer().double()
    probs = torch.randn(1, 16, 12, dtype=torch.float64).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: tokenizer.decode(p)[:, :, ::5, ::5], probs, fast_mode=True)


def test_straight_through_passes_the_decoder_gradient_to_the_encoder():
    tokenizer = small_tokenizer()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    y, z, q = tokenizer(images)
    assert torch.allclose(y, tokenizer.decode(tokenizer.encode(images)), atol=1e-5)
    assert torch.equal(q, tokenizer.codebook(tokenizer.encode(images)))
    brute = torch.cdist(z, tokenizer.codebook.weight[None]).argmin(-1)
    assert torch.equal(tokenizer.nearest(z), brute)


# -----------------------------------------------------------------------------
# Transformer and soft embedding

def test_soft_embedding_of_one_hot_is_the_hard_embedding():
    model = small_model()
    ids, mask = torch.randint(12, (2, 16)), torch.rand(2, 16) < 0.5
    for m in (None, mask):
        hard, soft = model.embed(ids, m), model.embed(F.one_hot(ids, 12).float(), m)
        assert torch.equal(hard, soft) and hard.shape == (2, 16, 24)
    assert torch.equal(model.embed(ids, mask), model.embed(ids.masked_fill(mask, model.mask_id)))


def test_soft_embedding_is_the_expectation():
    model = small_model().double()
    probs = torch.randn(2, 16, 12, dtype=torch.float64).softmax(-1)
    brute = sum(probs[..., v:v + 1] * model.embed(torch.full((2, 16), v)) for v in range(12))
    assert torch.allclose(model.embed(probs), brute, atol=1e-12)
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: model(p, torch.zeros(2, 3).long())[:, ::5, ::5], probs, fast_mode=True)


def test_forward_takes_ids_probabilities_and_embeddings():
    for D in (24, 12):                                                          # 12 = V: told apart by their sums
        model, ids = small_model(D=D), torch.randint(12, (2, 16))
        cond = torch.randint(5, (2, 3))
        logits = model(ids, cond)
        assert logits.shape == (2, 16, 12) and torch.equal(logits, model(model.embed(ids), cond))
        assert torch.equal(logits, model(F.one_hot(ids, 12).float(), cond))
        states = model.features(model.embed(ids), cond, [1, 2])
        assert [tuple(s.shape) for s in states] == [(2, 16, D)] * 2 and not torch.equal(*states)
    assert not torch.allclose(logits, model(ids, model.null(cond)))
    label_model = small_model(T=1)
    assert torch.equal(label_model(ids, torch.tensor([1, 2])), label_model(ids, torch.tensor([[1], [2]])))


def test_noise_has_the_stated_variance_and_spares_the_condition():
    model = small_model(N=4096, T=1, depth=1)
    seen = []
    model.features = lambda emb, cond, layers: seen.append(emb) or [emb]
    ids = torch.zeros(1, 4096).long()
    model(ids, torch.zeros(1, 1).long(), sigma=0.6, rng=torch.Generator().manual_seed(0))
    noise = seen[0] - 0.8 * model.embed(ids)                                    # sqrt(1 - .6^2) = .8
    assert abs(noise.std() - 0.6) < 0.01 and abs(noise.mean()) < 0.01


def test_blocks_are_pre_norm_or_post_norm():
    x = torch.randn(2, 7, 24)
    pre, post = (M.Block(24, 2, 48, post_norm, 1e-5) for post_norm in (False, True))
    a = pre.attention(pre.norm1(x)) + x
    assert torch.allclose(pre(x), a + pre.mlp(pre.norm2(a)))
    assert torch.allclose(post(x).mean(-1), torch.zeros(2, 7), atol=1e-5)       # ends in a norm
    q, k, v = pre.qkv(x).view(2, 7, 3, 2, 12).unbind(2)
    score = torch.einsum('bihd,bjhd->bhij', q, k) / 12 ** 0.5                    # brute-force attention
    brute = torch.einsum('bhij,bjhd->bihd', score.softmax(-1), v).reshape(2, 7, 24)
    assert torch.allclose(pre.attention(x), pre.proj(brute), atol=1e-5)


# -----------------------------------------------------------------------------
# Masking, sampling

def test_masking_hits_the_exact_count_uniformly():
    tokens = torch.zeros(4000, 16).long()
    ratio = torch.rand(4000)
    mask = M.mask_tokens(tokens, ratio)
    assert torch.equal(mask.sum(1), (ratio * 16).round().clamp(min=1).long()) and mask.dtype == torch.bool
    assert M.mask_tokens(tokens, torch.zeros(4000)).sum(1).eq(1).all() and M.mask_tokens(tokens, torch.ones(4000)).all()
    share = M.mask_tokens(tokens, torch.full((4000,), 0.25)).float().mean(0)
    assert (share - 0.25).abs().max() < 0.04


def test_mask_ratio_follows_its_law():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.allclose(torch.cos(M.mask_ratio(u) * math.pi / 2), u) and M.mask_ratio(torch.tensor(0.0)) == 1
    assert torch.allclose(M.mask_ratio(u, 'cosine'), torch.cos(math.pi * u / 2))
    exits_with(lambda: M.mask_ratio(u, 'linear'), 'arccos or cosine')


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
    assert counts[1] == 0 and scipy.stats.chisquare(counts[[0, 2, 3]].numpy(), [20000, 8000, 12000]).pvalue > 1e-4


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


def test_teacher_sampler_reveals_every_token_once():
    model, cond = small_model(), torch.randint(5, (6, 3))
    for steps in (1, 2, 5, 16):
        counts = M.reveal_counts(steps, 16)
        assert len(counts) == steps and sum(counts) == 16 and min(counts) >= 1
        visible = []
        spy = lambda x, c: visible.append((x != 12).sum(1)) or small(x, c)
        small = model.forward
        model.forward, model.eval = spy, model.eval
        tokens = M.sample_teacher(model, cond, steps, cfg_scale=1.0)
        del model.forward
        assert ((tokens >= 0) & (tokens < 12)).all()
        assert torch.stack(visible)[:, 0].tolist() == [sum(counts[:k]) for k in range(steps)]
    assert M.reveal_counts(8, 256) == [1, 18, 26, 32, 38, 43, 48, 50]           # the published MaskGIT table
    exits_with(lambda: M.reveal_counts(17, 16), '1..16')


def test_sampler_schedule_equals_the_golden_tables():
    if not os.environ.get('GOLDEN'):
        raise Skip('GOLDEN is not set')
    tables = torch.load(os.path.join(os.environ['GOLDEN'], 'schedules.pt'), weights_only=True)['maskgit']
    for name, table in tables.items():
        expected = torch.as_tensor(table['tokens_unmasked_at_step']).tolist()
        assert M.reveal_counts(len(expected), sum(expected)) == expected, name


def test_an_image_does_not_depend_on_its_batch():
    teacher, cond = small_model(), torch.randint(5, (7, 3))
    one = lambda c, rng: M.one_step(teacher, c, 0.6, 0.3, rng=rng)[1]
    many = lambda c, rng: M.sample_teacher(teacher, c, 4, rng=rng)
    for draw in (one, many):
        whole = draw(cond, M.image_rngs(0, range(7)))
        parts = torch.cat([draw(cond[k:k + 2], M.image_rngs(0, range(k, min(k + 2, 7)))) for k in range(0, 7, 2)])
        assert torch.equal(whole, parts) and not torch.equal(whole, draw(cond, M.image_rngs(1, range(7))))


# -----------------------------------------------------------------------------
# Di[M]O

def pair_of_logits():
    rng = torch.Generator().manual_seed(0)
    teacher, aux = (2 * torch.randn(3, 5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    return teacher, aux.requires_grad_(), torch.rand(3, 5, generator=rng) < 0.6


def test_divergence_gradient_equals_autograd():
    teacher, aux, mask = pair_of_logits()
    for beta in (-0.2, 0.0, 0.5, 1.0, 1.7):
        auto, = torch.autograd.grad(M.jeffreys(teacher, aux, mask, beta).sum(), aux)
        closed = M.dimo_grad(teacher, aux.detach(), mask, beta)
        assert torch.allclose(closed, auto, atol=1e-12) and (closed[~mask] == 0).all()


def test_divergence_is_the_two_kls_at_beta_0_and_1():
    teacher, aux, mask = pair_of_logits()
    p, q = teacher.softmax(-1).numpy(), aux.detach().softmax(-1).numpy()
    for beta, kl in ((0.0, scipy.stats.entropy(p, q, axis=-1)), (1.0, scipy.stats.entropy(q, p, axis=-1))):
        brute = torch.from_numpy(kl * mask.numpy()).sum(-1)
        assert torch.allclose(M.jeffreys(teacher, aux, mask, beta), brute)
    assert M.jeffreys(teacher, teacher, mask, -0.2).abs().max() < 1e-12
    assert M.dimo_grad(teacher.float(), teacher.float(), mask, -0.2).abs().max() < 1e-6


def test_surrogate_hands_its_gradient_to_the_logits():
    logits, grad = torch.randn(4, 5, 7, requires_grad=True), torch.randn(4, 5, 7)
    M.surrogate(logits, grad).backward()
    assert torch.allclose(logits.grad, grad / 4)


def test_auxiliary_loss_counts_masked_positions_only():
    logits, tokens = torch.randn(2, 16, 12, requires_grad=True), torch.randint(12, (2, 16))
    mask = M.mask_tokens(tokens, torch.tensor([0.3, 0.7]))
    loss = distill.aux_loss(logits, tokens, mask, 0.0)
    brute = -(logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * mask).sum() / mask.sum()
    assert torch.allclose(loss, brute)
    loss.backward()
    assert (logits.grad[~mask] == 0).all()
    x_t, m = distill.remask(tokens, 12, 'arccos', torch.Generator().manual_seed(0))
    assert (x_t[m] == 12).all() and torch.equal(x_t[~m], tokens[~m])


def test_gradients_flow_from_one_step_to_the_generator_only():
    generator, teacher = small_model(), small_model().requires_grad_(False)
    cond = torch.randint(5, (4, 3))
    logits, tokens = M.one_step(generator, cond, 0.6, 0.3)
    x_t, mask = distill.remask(tokens, 12, 'arccos', None)
    grad = M.dimo_grad(M.guided_logits(teacher, x_t, cond, 2.0), generator(x_t, cond).detach(), mask, 0.0)
    M.surrogate(logits, grad).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in generator.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and not tokens.requires_grad


def test_ema_is_the_weighted_mean():
    a, b = small_model(), small_model()
    b.bias.data += 1
    expected = 0.9 * a.bias + 0.1 * b.bias
    M.ema_update(a, b, 0.9, 10 ** 6)
    assert torch.allclose(a.bias, expected)


# -----------------------------------------------------------------------------
# Metrics

def test_frechet_distance_against_scipy_and_closed_forms():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 8, generator=rng, dtype=torch.float64) @ torch.randn(8, 8, generator=rng, dtype=torch.float64)
            for _ in range(2))
    s1, s2 = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    scipys = gap + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(M.frechet_distance(x, y) - scipys) < 1e-6 * scipys
    assert abs(M.frechet_distance(x, x)) < 1e-6
    assert abs(M.frechet_distance(x, x + 3) - 8 * 9) < 1e-6                      # equal covariance: |mean difference|^2
    z = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T   # white
    a, b = torch.arange(1, 9.0, dtype=torch.float64), torch.arange(2, 10.0, dtype=torch.float64)
    assert abs(M.frechet_distance(z * a, z * b) - ((a - b) ** 2).sum()) < 1e-6   # diagonal covariances


def test_precision_and_recall_of_known_sets():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(1200, 4, generator=rng, dtype=torch.float64)
    assert M.precision_recall(real, real) == (1.0, 1.0) and M.precision_recall(real, real + 100) == (0.0, 0.0)
    collapsed = real[:1].expand(500, 4) + 1e-4 * torch.randn(500, 4, generator=rng, dtype=torch.float64)
    precision, recall = M.precision_recall(real, collapsed)
    assert precision > 0.95 and recall < 0.05
    fake = real[:300] + 0.5
    d = torch.cdist(real, real).sort(1).values[:, 3]
    assert abs(M.precision_recall(real, fake)[0] - (torch.cdist(fake, real) < d).any(1).double().mean()) < 1e-12


# -----------------------------------------------------------------------------
# Whole runs

def test_pipeline_of_tiny_networks_runs_and_leaves_its_files():
    with tempfile.TemporaryDirectory() as root:
        folder = copy_of_tiny_run(f'{root}/out')
        text = must_run('distill.py', f'--out_dir={folder}')
        table = json.load(open(f'{folder}/distill.json'))
        assert [r['name'] for r in table['rows']][-1] == 'student, 1 step' and table['rows'][-1]['passes'] == 1
        assert 'toy FD' in text and table['rows'][-1]['n'] == 40 and 'held-out renders' in table['rows'][0]['reference']
        lines = [json.loads(line) for line in open(f'{folder}/distill.log.jsonl')]
        assert [r['step'] for r in lines] == [2, 4, 6, 8, 10, 12] and all(math.isfinite(r['divergence']) for r in lines)
        for picture in ('distill.png', 'distill-000000.png', 'distill-000012.png'):
            assert Image.open(f'{folder}/{picture}').size[0] > 100
        must_run('sample.py', '--ckpt', f'{folder}/distill.pt', '--prompt', 'a red circle', '--n=4', f'--png_dir={root}/png')
        must_run('sample.py', '--ckpt', f'{folder}/distill.pt', '--prompt', 'a red circle', '--n=2', '--batch=1', f'--png_dir={root}/png2')
        for k in range(2):                                                      # the same image whatever the batch
            assert open(f'{root}/png/{k:05d}.png', 'rb').read() == open(f'{root}/png2/{k:05d}.png', 'rb').read()
        text = must_run('sample.py', '--ckpt', f'{folder}/model.pt', '--steps=2', '--metrics', '--n_metrics=30')
        assert 'held-out renders' in text and 'seeds (0, 0..29)' in text and 'counting' in text


def test_folder_goes_through_the_whole_pipeline():
    with tempfile.TemporaryDirectory() as root:
        for k in range(40):
            os.makedirs(f'{root}/data/{"zero one".split()[k % 2]}', exist_ok=True)
            Image.new('L', (28, 28), 60 * (k % 2) + k).save(f'{root}/data/{"zero one".split()[k % 2]}/{k}.png')
        folder, data = f'{root}/out', f'--data={root}/data'
        must_run('tokenizer.py', f'--out_dir={folder}', data)
        must_run('model.py', f'--out_dir={folder}', data)
        must_run('distill.py', f'--out_dir={folder}', data, '--steps=2')
        must_run('sample.py', '--ckpt', f'{folder}/distill.pt', '--label=zero', '--n=2')
        must_run('sample.py', '--ckpt', f'{folder}/distill.pt', '--label=1', '--n=2')
        code, text = run('sample.py', '--ckpt', f'{folder}/distill.pt', '--label=two')
        assert code and 'zero' in text
        code, text = run('distill.py', f'--out_dir={folder}')
        assert code and 'was trained on' in text


def killed_and_resumed(script, folder, whole, limit):
    """Run `script` to its end in `whole`, and in `folder` with kill -9 at a random moment after the first save."""
    must_run(script, f'--out_dir={whole}')
    name = script[:-3] + '.pt'
    command = [sys.executable, os.path.join(HERE, script)] + TINY[script].split() + [f'--out_dir={folder}']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS='1'))
    started = time.time()
    fresh = lambda: os.path.exists(f'{folder}/{name}') and not os.path.samefile(f'{folder}/{name}', f'{tiny_run()}/{name}') \
        if os.path.exists(f'{tiny_run()}/{name}') else os.path.exists(f'{folder}/{name}')
    while process.poll() is None and time.time() - started < 120 and not fresh():
        time.sleep(0.01)
    time.sleep(random.random() * limit)
    process.send_signal(signal.SIGKILL)
    process.wait()
    must_run(script, f'--out_dir={folder}', '--resume')
    a, b = load(f'{whole}/{name}'), load(f'{folder}/{name}')
    a['config'], b['config'] = ({k: v for k, v in c['config'].items() if k not in ('out_dir', 'resume')} for c in (a, b))
    same(a, b)
    assert open(f'{whole}/{name[:-3]}.log.jsonl').read() == open(f'{folder}/{name[:-3]}.log.jsonl').read()


def test_kill_and_resume_equals_an_uninterrupted_run_bit_for_bit():
    with tempfile.TemporaryDirectory() as root:
        killed_and_resumed('distill.py', copy_of_tiny_run(f'{root}/a'), copy_of_tiny_run(f'{root}/b'), 1.0)


def test_tokenizer_and_teacher_resume_bit_for_bit_too():
    with tempfile.TemporaryDirectory() as root:
        for name in ('tokenizer', 'model'):
            folders = [copy_of_tiny_run(f'{root}/{name}{k}') for k in range(2)]
            for folder in folders:
                for path in glob.glob(f'{folder}/{name}*.pt'):
                    os.remove(path)
            killed_and_resumed(f'{name}.py', *folders, 0.3)


def test_ctrl_c_leaves_a_usable_file():
    with tempfile.TemporaryDirectory() as root:
        folder = copy_of_tiny_run(f'{root}/out')
        command = [sys.executable, os.path.join(HERE, 'distill.py')] + TINY['distill.py'].split() + [f'--out_dir={folder}', '--steps=100000', '--save_every=100000']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
        while not (os.path.exists(f'{folder}/distill.log.jsonl') and os.path.getsize(f'{folder}/distill.log.jsonl')):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and 'Traceback' not in text, text[-800:]
        state = load(f'{folder}/distill.pt')
        last = json.loads(open(f'{folder}/distill.log.jsonl').read().splitlines()[-1])
        assert state['step'] >= last['step'] > 0


def test_two_processes_give_the_gradient_of_one():
    with tempfile.TemporaryDirectory() as root:
        one, two = copy_of_tiny_run(f'{root}/one'), copy_of_tiny_run(f'{root}/two')
        settings = ['--steps=2', '--micro_batch=4', '--save_every=2', '--warmup=1']
        must_run('distill.py', f'--out_dir={one}', *settings)
        must_run('distill.py', f'--out_dir={two}', *settings, processes=2)
        a, b = load(f'{one}/distill.pt'), load(f'{two}/distill.pt')
        for name in ('net', 'aux', 'ema'):
            for key, value in a[name].items():
                assert torch.allclose(value, b[name][key], atol=1e-6), (name, key)
        first = lambda s: torch.cat([v['exp_avg'].flatten() for v in s['optimizers'][0]['state'].values()])
        scale = first(a).abs().max()
        assert (first(a) - first(b)).abs().max() < 1e-4 * scale                 # Adam's mean is the averaged gradient


def test_released_order_and_bench_run():
    with tempfile.TemporaryDirectory() as root:
        folder = copy_of_tiny_run(f'{root}/out')
        must_run('distill.py', f'--out_dir={folder}', '--steps=2', '--reuse=false', '--beta=-0.2')
        text = must_run('distill.py', f'--out_dir={folder}', '--bench')
        assert re.search(r'ms_per_step [\d.]+, images_per_s [\d.]+.*share_of_peak 0\.\d+, peak_memory_mb \d+', text), text


# -----------------------------------------------------------------------------
# Files and errors

def test_truncated_checkpoint_is_reported_and_the_previous_one_used():
    with tempfile.TemporaryDirectory() as root:
        path = f'{root}/x.pt'
        for step in (1, 2):
            T.save_checkpoint(path, dict(stage='distill', step=step, net=torch.ones(1000)))
        data = open(path, 'rb').read()
        open(path, 'wb').write(data[:len(data) // 2])
        exits_with(lambda: T.load_checkpoint(path), 'truncated or not a checkpoint')
        assert T.load_checkpoint(path, 'distill', fallback=True)['step'] == 1
        os.remove(path)                                                         # died between the two renames
        assert T.load_checkpoint(path, 'distill', fallback=True)['step'] == 1


def test_code_in_a_checkpoint_is_refused_and_not_executed():
    with tempfile.TemporaryDirectory() as root:
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (f'{root}/executed',)
        torch.save(dict(stage='distill', bomb=Bomb()), f'{root}/bomb.pt')
        exits_with(lambda: T.load_checkpoint(f'{root}/bomb.pt'), 'refused', 'nothing in it was executed')
        assert not os.path.exists(f'{root}/executed')


def test_missing_foreign_and_wrong_checkpoints_are_explained():
    with tempfile.TemporaryDirectory() as root:
        exits_with(lambda: T.load_checkpoint(f'{root}/no.pt', hint='Train it.'), 'no such checkpoint', 'Train it.')
        torch.save({'weights': torch.ones(3)}, f'{root}/foreign.pt')
        exits_with(lambda: T.load_checkpoint(f'{root}/foreign.pt'), 'not a checkpoint of this project')
        open(f'{root}/text.pt', 'w').write('hello')
        exits_with(lambda: T.load_checkpoint(f'{root}/text.pt'), 'text.pt')
        open(f'{root}/empty.pt', 'w').close()
        exits_with(lambda: T.load_checkpoint(f'{root}/empty.pt'), 'truncated or not a checkpoint')
        T.save_checkpoint(f'{root}/t.pt', dict(stage='tokenizer', step=1))
        exits_with(lambda: T.load_checkpoint(f'{root}/t.pt', 'model|distill'), 'is a tokenizer checkpoint', 'model or distill')
        exits_with(lambda: T.restore(small_model(), small_model(D=12).state_dict(), 'f.pt', 'net'), 'f.pt', 'net', 'size mismatch')


def test_no_space_and_no_permission_are_one_line_and_lose_nothing():
    with tempfile.TemporaryDirectory() as root:
        path = f'{root}/x.pt'
        T.save_checkpoint(path, dict(stage='distill', step=1))
        code = (f'import resource, sys, torch; sys.path.insert(0, {HERE!r}); import tokenizer as T\n'
                f'resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n'
                f'T.save_checkpoint({path!r}, dict(stage="distill", step=2, net=torch.ones(10 ** 6)))')
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert done.returncode == 1 and 'cannot write' in done.stderr and 'Traceback' not in done.stderr, done.stderr[-800:]
        assert T.load_checkpoint(path)['step'] == 1 and os.listdir(root) == ['x.pt']
        open(f'{root}/file', 'w').close()
        exits_with(lambda: T.save_checkpoint(f'{root}/file/x.pt', dict(stage='distill')), 'cannot write')
        code, text = run('tokenizer.py', f'--out_dir={root}/file/out')
        assert code == 1 and 'cannot write' in text and 'Traceback' not in text, text[-800:]


def test_errors_of_the_scripts_are_one_line():
    folder = tiny_run()
    cases = [(('distill.py', '--batchsize=3'), 'did you mean --batch_size?'),
             (('distill.py', f'--out_dir={folder}', '--micro_batch=3'), 'is not a multiple'),
             (('distill.py', '--teacher_ckpt=nowhere.pt'), 'no such checkpoint'),
             (('distill.py', f'--teacher_ckpt={folder}/tokenizer.pt'), 'expected model'),
             (('distill.py', f'--out_dir={folder}', '--resume'), 'Start without --resume'),
             (('sample.py', '--ckpt', f'{folder}/model.pt', '--prompt', 'a purple circle'), "unknown word 'purple'"),
             (('sample.py', '--ckpt', f'{folder}/model.pt', '--label', 'cat'), '--prompt'),
             (('sample.py', '--ckpt', f'{folder}/model.pt', '--steps=99'), 'more than the 64 tokens')]
    for arguments, words in cases:
        code, text = run(*arguments)
        assert code == 1 and words in text and 'Traceback' not in text, (arguments, text[-800:])


# -----------------------------------------------------------------------------
# The repository

def test_scripts_import_only_what_the_design_allows():
    allowed = {'torch', 'numpy', 'tqdm', 'PIL', 'scipy', *sys.stdlib_module_names}
    ours = {'tokenizer.py': set(), 'model.py': {'tokenizer'}}
    for path in glob.glob(f'{HERE}/*.py'):
        name = os.path.basename(path)
        if name == 'test_all.py':
            continue
        tree = ast.parse(open(path, encoding='utf-8').read())
        found = {a.name.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        found |= {node.module.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert found <= allowed | ours.get(name, {'tokenizer', 'model'}), (name, found - allowed)


def test_readme_points_at_the_right_lines():
    path = f'{HERE}/README.md'
    rows = re.findall(r'`(\w+\.py):(\d+)` +\| +`([^`]+)`', open(path, encoding='utf-8').read())
    assert len(rows) >= 10
    for name, line, text in rows:
        assert text in open(f'{HERE}/{name}', encoding='utf-8').read().splitlines()[int(line) - 1], (name, line, text)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    words, counts, started = sys.argv[1:], dict(passed=0, failed=0, skipped=0), time.time()
    tests = [(n, f) for n, f in list(globals().items()) if n.startswith('test_') and inspect.isfunction(f)]
    for name, test in tests:
        if words and not any(w in name for w in words):
            continue
        torch.manual_seed(0)
        clock, outcome, note = time.time(), 'passed', ''
        try:
            test()
        except Skip as reason:
            outcome, note = 'skipped', f': {reason}'
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = 'failed'
            traceback.print_exc()
        counts[outcome] += 1
        print(f'{outcome:8s}{time.time() - clock:6.1f} s  {name}{note}', flush=True)
    print(f'{time.time() - started:.0f} seconds')
    print(f'{counts["passed"]} passed, {counts["failed"]} failed, {counts["skipped"]} skipped')
    sys.exit(counts['failed'] > 0)
