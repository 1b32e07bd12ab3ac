"""
What the helpers in common/ promise: settings, the shapes world, folders, optimizers, metrics, published
files, rewards, our own files. Nothing here is about the paper; its equations are tested in test_all.py,
which also runs these (`python test_all.py`, or `pytest common/test_common.py`).
"""
import ast
import collections
import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import distill
import gan
import model
import reward
import sample
import tokenizer
import tteo
from common import metrics, pictures, power, reader, rewards, world
from common.benchmarks import check_new, write_npz
from common.files import (Log, can_be_mapped, check_origin, load_checkpoint, load_resumed, optimizer_states, restore,
                          restore_optimizers, resumes, save_checkpoint, settings_of)
from common.images import captions_of, open_data, read_image, token_data, word_ids
from common.run import (LAUNCHER, Muon, Stop, apply_gradients, configure, console, ema_update,
                        launched, make_optimizers, micro_rng, out_folder, report_bench, report_error,
                        results_files, setting_names, split_batch, try_writing, wanted_instead)
from common.teachers import (TOKENIZERS, TRANSFORMERS, load_teacher, train_missing, unpack,
                             word_teacher)
from common.testing import (FULL, HERE, SCRIPTS, UNTRAINED, capture, exits_with, golden, mini,
                            mini_tokenizer, must_refuse, must_run, near, picture_folder, printed, published,
                            ready_for, rng, run, same, save_safetensors, small_model, small_tokenizer, tiny_clip,
                            tiny_run,
                            transformers_or_skip)
from model import MDM, reveal_counts, sampling_plan
from tokenizer import Tokenizer

CPU = torch.device('cpu')
RED = 'a red circle'


# -----------------------------------------------------------------------------
# Settings

def settings(**more):
    """The globals of a script: a setting of every type, two that are none."""
    g = dict(__file__='x.py', SIZE=1)
    g.update(lr=0.1, steps=10, note='', flag=False, batch_size=8, D=96)
    g.update(more)
    return g


def test_overrides_take_every_documented_form():
    forms = {
        '--lr=1': dict(lr=1.0), '--lr -0.2': dict(lr=-0.2), '--steps=1e5': dict(steps=100000),
        '--D=32': dict(D=32), '--note=123': dict(note='123'), '--note=a=b': dict(note='a=b'),
        '--flag': dict(flag=True), '--flag=False': {}, '--flag 0': {}, '': {},
        '--flag --lr 2': dict(flag=True, lr=2.0), '--batch-size 4': dict(batch_size=4),
        '--note=~/x': dict(note=os.path.expanduser('~/x')), '--note=x/~': dict(note='x/~')}
    for words, changed in forms.items():
        g = settings()
        returned = configure(g, argv=words.split())
        wanted = settings(**changed)
        del g['GIVEN'], g['CHANGED']                       # names of what the words give
        assert g == wanted, words
        assert all(type(g[key]) is type(value) for key, value in wanted.items()), words
        del wanted['__file__'], wanted['SIZE']
        assert returned == wanted, words


def test_overrides_refuse_with_one_line():
    limits = dict(batch_size=1)
    uses = {'--teacher=maskgit': 'teacher_path', '--flag=false': 'note'}

    def in_use(s):
        return [f'--teacher={s.teacher}', f'--flag={s.flag}'.lower()]

    g = settings(data='shapes', teacher='ours', teacher_path='', LIMITS=limits, USES=uses, in_use=in_use)
    cases = {
        '--batchsize=3': ('x.py', 'unknown setting --batchsize', 'did you mean --batch_size?'),
        '--SIZE=3': ('unknown setting',),
        '--steps=1.5': ('int', 'default 10', "'1.5'"),
        '--steps=many': ('int', "'many'"),
        '--flag=maybe': ('true, false, 1 or 0', "'maybe'"),
        '--lr=fast': ('float', 'default 0.1', "'fast'"),
        '--lr': ('--lr needs a value',),
        '--lr --flag': ('--lr needs a value',),
        'lr=3': ("stray word 'lr=3'", '--name=value'),
        '-lr 3': ('stray word',),
        '--batch_size=0': ('--batch_size=0', 'at least 1'),
        '--data=': ('--data= cannot be, expected a name',),
        '--teacher_path=x.pt': ('x.py: --teacher_path has no effect here; it goes with --teacher=maskgit',),
        '--note=1 --flag': ('--note has no effect here; it goes with --flag=false',)}
    for words, expected in cases.items():
        with exits_with(*expected):
            configure(dict(g), argv=words.split())


def test_a_setting_outside_its_limits_is_refused():
    cases = {
        'tau=0': 'at least', 'warmup=-1': 'at least 0', 'steps=0': 'at least 1',
        'r_init=2': 'between 0 and 1', 'beta2=1': 'between 0 and', 'schedule=linear':
        "'arccos', 'cosine'", 'relax=hard': "'soft', 'gumbel', 'st'", 'r_init=nan': 'finite',
        'cfg_scale=inf': 'finite', 'seed=9223372036854775808': 'below', 'p_near=0.9':
        'are shares of one whole'}
    for words, expected in cases.items():
        with exits_with(f'--{words.partition("=")[0]}=', expected):
            configure(dict(vars(gan)), argv=[f'--{words}'])
    with exits_with('--power=-1', 'at least 0'):
        configure(dict(vars(sample)), argv=['--power=-1'])
    for script in (tokenizer, model):
        with exits_with('--out_dir= cannot be'):
            configure(dict(vars(script)), argv=['--out_dir='])
    for script in (tokenizer, model, distill, gan, reward):    # a run of no step would write no file
        assert vars(script)['LIMITS']['steps'] == 1


def test_limits_and_what_a_checkpoint_hands_on_are_settings_of_their_script():
    for script in (tokenizer, model, distill, gan, reward, sample, tteo):
        g = vars(script)
        names = setting_names(g)
        assert set(g['LIMITS']) <= set(names), script.__name__
        for name in names:                                 # a default lies within its limits
            assert not wanted_instead(name, g[name], g['LIMITS'].get(name), g[name]), name
        for name in g.get('INHERITED', ()):
            assert type(g[name]) is type(vars(distill)[name]), (script.__name__, name)
        for choice, used in g.get('USES', {}).items():
            assert set(used.split()) <= set(names), (script.__name__, choice)


PUBLISHED = '--teacher=maskgit --teacher_path=a --tokenizer_path=b'
FID = '--inception=a --ref=b'


def test_a_setting_without_effect_is_named_and_one_with_effect_taken():
    without = {                                        # the first word is what has no effect
        sample: ['--ref=x', '--ref=x --metrics', '--inception=x', '--inception=x --metrics', f'--sweep --metrics {FID}',
                 f'--inception_sha256=x --sweep {FID}', '--prompt=x --metrics', '--label=x --sweep', '--n=2 --metrics',
                 '--n_metrics=2000', '--n_reference=9', '--clip_path=x', f'--clip_path=x --metrics {FID}',
                 '--png_dir=x --metrics', '--npz=x --bench', '--grid=x --metrics', '--bench --metrics', '--layout=mjhq',
                 '--layout=mjhq --prompts=x', '--label=x --prompts=y', '--prompt=x --label=y', '--prompts=x --metrics',
                 '--cfg_scale=2 --sweep', '--bert_path=x --metrics', '--ref_from=x --metrics', '--ref_size=9',
                 f'--metrics --ref_from=x {FID}', f'--ckpt=x --ref_from=x {FID}', '--student', '--teacher_path=x',
                 f'--weights=net {PUBLISHED}', f'--ckpt=x {PUBLISHED}', f'--teacher_grid=9 {PUBLISHED}'],
        distill: ['--teacher_path=x', '--tokenizer_path=x', '--text_path=x', '--prompts=x', '--teacher_heads=2',
                  f'--prompts=x {PUBLISHED}', f'--teacher_ckpt=x {PUBLISHED}', f'--aux_momentum=.8 {PUBLISHED}',
                  '--schedule=cosine'],
        gan: ['--relax=st --w_gan=0', '--disc_lr=1 --w_gan=0', '--beta=1 --w_dimo=0', '--aux_momentum=.9 --aux_muon=0',
              '--through_pixels --w_gan=0', '--gan_ratio=3 --w_gan=0', '--gan_ratio=3 --w_dimo=0',
              '--w_gan=5 --gan_ratio=3'],
        reward: ['--clip_path=x', '--pick_path=x --held_out=hps', '--bert_path=x --w_pick=1', '--cfg_scale=1 --w_dimo=0',
                 '--reward_steps=3 --w_clip=0 --held_out=pick'],
        tteo: ['--hps_path=x', '--tokenizer_path=x'],
        model: ['--n_images=9 --data=/x']}
    used = {
        sample: [f'--metrics {FID}', f'--metrics {FID} --layout=mjhq --prompts=x', '--layout=mjhq --prompts=x --npz=y',
                 f'--ref_from=x {FID} --ref_size=9', '--prompts=x --metrics --clip_path=y', '--sweep --n_metrics=9',
                 '--metrics --png_dir= --sweep=0', f'{PUBLISHED} --student --r_init=1'],
        distill: ['--schedule=cosine --p_near=0', f'{PUBLISHED} --schedule=cosine', '--teacher_ckpt=x'],
        gan: ['--relax=st', '--w_gan=0 --beta=1', '--w_gan=5', '--w_gan=5 --w_dimo=0'],
        reward: ['--held_out=clipscore,pick --pick_path=x', '--w_hps=1 --clip_path=x --hps_path=y'],
        tteo: ['--w_pick=1 --clip_path=x'],
        model: ['--n_images=9 --data=shapes-open']}
    for script, commands in without.items():
        for command in commands:
            key = command.split()[0].partition('=')[0]
            with exits_with(f'{script.__name__}.py: {key} has no effect here; '), capture():
                configure(dict(vars(script)), getattr(script, 'RECIPES', {}), None, command.split())
    for script, commands in used.items():
        for command in commands:
            with capture():
                configure(dict(vars(script)), getattr(script, 'RECIPES', {}), None, command.split())


def test_results_are_named_by_every_setting_that_differs_and_go_where_they_can_be_written(tmp_path):
    made, base = set(), dict(seed=0, ref='', steps=0, ckpt='x', note='')
    for changes in (dict(), dict(seed=1), dict(steps=8), dict(seed=1, steps=8), dict(ref='a/r.npz'), dict(ref='b/r.npz'),
                    dict(note='a ' * 99), dict(note='b ' * 99)):
        named, *newest = results_files(f'{tmp_path}/x', 'metrics', {**base, **changes}, [*changes, 'ckpt'])
        made.add(named)
        assert newest == [f'{tmp_path}/x-metrics.json'] * bool(changes)
    assert len(made) == 8
    assert f'{tmp_path}/x-metrics-seed=1-steps=8.json' in made and f'{tmp_path}/x-metrics.json' in made
    assert os.listdir(tmp_path) == []                  # it was only tried
    (tmp_path / 'file').touch()                        # root may write everywhere but below a file
    before = os.getcwd()
    os.chdir(tmp_path)
    with capture() as text:
        elsewhere, = results_files('file/x', 'metrics', base, [])
    os.chdir(before)
    assert elsewhere == 'out/file-x-metrics.json'
    assert 'it is written to out/file-x-metrics.json' in text.getvalue()
    for path in (f'{tmp_path}/file/x.png', tmp_path):
        with exits_with(f'cannot write {path}'):
            try_writing(path)


def test_the_command_line_beats_the_recipe_the_recipe_the_checkpoint_and_that_the_default():
    def handed_on(found):
        return dict(lr=0.2, steps=20, D=20, teacher='maskgit')

    recipes = dict(maskgit=dict(lr=0.3, steps=30), maskbit=dict(lr=9.0))
    g = settings(teacher='ours')
    with capture() as text:
        configure(g, recipes, handed_on, ['--lr=0.4', '--D=20'])
    assert (g['lr'], g['steps'], g['D'], g['batch_size']) == (0.4, 30, 20, 8)
    assert g['GIVEN'] == ('lr', 'D') and g['CHANGED'] == ('lr',)
    assert text.getvalue() == 'recipe of --teacher=maskgit: --steps=30\n'
    assert out_folder('', 'ours') == 'out' and out_folder('', 'maskgit') == 'out/maskgit'
    assert out_folder('here', 'maskgit') == 'here'


def test_help_prints_the_block():
    for script in (tokenizer, model, distill, gan, reward, sample, tteo):
        with capture() as text:
            try:
                configure(dict(vars(script)), argv=['--help'])
            except SystemExit as end:
                assert end.code == 0
        assert f'python {script.__name__}.py' in text.getvalue()
        assert 'seed = 0     ' in text.getvalue()


TRAINERS = (tokenizer, model, distill, gan, reward)
DISTILLERS = (distill, gan, reward)
DRAWERS = (tteo, sample)
SPEAKERS = {                   # who can print a message of common/ that names this setting
    'data': (*TRAINERS, *DRAWERS), 'resume': TRAINERS, 'overwrite': TRAINERS, 'batch_size': TRAINERS,
    'out_dir': TRAINERS, 'schedule': DISTILLERS, 'flips': (model, gan), 'reward_steps': (reward,),
    'prompts': (*DISTILLERS, sample), 'text_path': (*DISTILLERS, *DRAWERS),
    'teacher': (*DISTILLERS, *DRAWERS), 'teacher_path': (*DISTILLERS, sample),
    'tokenizer_path': (*DISTILLERS, *DRAWERS), 'teacher_heads': (*DISTILLERS, sample),
    'teacher_ckpt': DISTILLERS, 'teacher_grid': (*DISTILLERS, sample), 'p_full': DISTILLERS, 'p_near': DISTILLERS,
    'held_out': (reward, tteo), 'w_': (), 'ref': (sample,), 'ckpt': DRAWERS,
    'bench': (reward, tteo),
    'clip_path': (reward, *DRAWERS), 'hps_path': (reward, *DRAWERS), 'pick_path': (reward, *DRAWERS),
    'imagereward_path': (reward, *DRAWERS), 'bert_path': (reward, *DRAWERS),
    'inception': (sample,), 'inception_sha256': (sample,), 'ref_from': (sample,), 'png_dir': (sample,),
    'image_size': (tokenizer,),                                # "of tokenizer.py", says the message
    'nproc_per_node': (), 'master_port': (),                   # "of torchrun"
    'name': (), 'help': ()}


def texts_of(path):
    """The strings of a file but its docstrings."""
    tree = ast.parse(pathlib.Path(path).read_text(encoding='utf-8'))
    about = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [node.value for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in about]


def test_messages_name_settings_of_every_script_that_prints_them():
    for path in glob.glob(f'{HERE}/common/*.py'):
        if os.path.basename(path).startswith(('test', 'timing')):      # whose commands have a test of their own
            continue
        for key in re.findall(r'--([a-z]\w*)', '\n'.join(texts_of(path))):
            assert key in SPEAKERS, (path, key)
    for key, scripts in SPEAKERS.items():
        for script in scripts:
            assert key in setting_names(vars(script)), (key, script.__name__)


def test_batch_must_divide():
    assert split_batch(32, 0, 2) == (16, 1)
    assert split_batch(32, 8, 2) == (8, 2)
    wanted = 'batch_size 100', '8 process(es) x 16 per process = 128', '--batch_size=128'
    with exits_with(*wanted):
        split_batch(100, 16, 8)


# -----------------------------------------------------------------------------
# The shapes world

def test_image_i_is_the_same_on_every_machine():
    images, captions = world.draw(range(64))
    pixels = ((images + 1) * 127.5).round().byte().numpy().tobytes()
    text = '\n'.join(captions).encode()
    digest = hashlib.sha256(pixels + text).hexdigest()
    assert digest[:16] == '36667cf50aa97aa4', digest
    again, names = world.draw([5, 63, 5])
    assert torch.equal(again[1], images[63])
    assert torch.equal(again[0], again[2]) and names[0] == captions[5]
    large, names = world.draw(range(64), scale=2)          # the same at twice the size
    assert names == captions
    assert (F.avg_pool2d(large, 2) - images).abs().max() < 0.1
    assert world.check(large, names).all()


def test_drawing_10000_images_takes_seconds():
    start = time.process_time()                            # the machine may be busy
    images, captions = world.draw(range(10_000))
    seconds = time.process_time() - start
    print(f'    10,000 images in {seconds:.1f} s')
    assert seconds < 30
    assert images.shape == (10_000, 3, 32, 32) and images.abs().max() <= 1
    assert set(' '.join(captions).split()) == set(world.WORDS)     # none unknown, none unused
    assert max(len(c.split()) for c in captions) == world.CAPTION_LENGTH


def test_checker_accepts_real_images_and_rejects_wrong_ones():
    images, captions = world.draw(range(world.HELD_OUT, world.HELD_OUT + 3000))
    u = np.random.RandomState(0).rand(3000, 3)
    wrong = [world.wrong_caption(caption, numbers) for caption, numbers in zip(captions, u)]
    tasks = np.array([world.parse_caption(caption)[0] for caption in captions])
    right = world.check(images, captions)
    accepted = world.check(images, wrong)
    for task in world.TASKS:
        at = tasks == task
        yes = right[at].mean()
        no = accepted[at].mean()
        print(f'    {task:14s} real accepted {yes:.3f}, wrong {no:.3f} ({at.sum()} images)')
        assert at.sum() > 300 and yes >= 0.95 and no <= 0.05
    exchanged = [sorted(w.split()) == sorted(c.split()) for w, c in zip(wrong, captions)]
    assert np.mean(exchanged) > 0.05                       # as 'a red circle above a blue square'
    empty = torch.full((1, 3, 32, 32), -0.8)               # nothing there: no mode is covered
    assert not world.check(empty, [RED])[0]
    assert world.factors(empty, ['four red circles'])['groups'] == 0.5


FACTORS = {'size', 'pairs', 'color pairs', 'groups', 'position', 'color', 'shape', 'background'}


@functools.cache
def objects_of(data='shapes', n=3000):
    """Held-out renders, their captions, and what `look` finds, `alone` for an image's only one."""
    index = range(world.HELD_OUT, world.HELD_OUT + n)
    images, captions = world.draw(index, open_background=data == 'shapes-open')
    found = world.look(images)
    number = np.bincount(found['image'], minlength=n)
    found['alone'] = number[found['image']] == 1
    return images, captions, found


def modes(found):
    """One mode of each factor -> which objects show it: the large, blue, circles, the upper."""
    return {'size': found['size'] == 1, 'color': found['color'] == 2, 'shape': found['shape'] == 0,
            'position': found['alone'] & (found['row'] < 16)}


def factors_of(keep, images, captions, data='shapes-open'):
    """The distances of some of the images."""
    return world.factors(images[keep], [captions[k] for k in keep], data)


def test_real_renders_follow_the_known_law_of_every_factor():
    for data in world.WORLDS:
        images, captions, _ = objects_of(data)
        truth = world.factors(images, captions, data)
        print(f'    {data}: ' + ', '.join(f'{k} {v:.3f}' for k, v in truth.items()))
        assert set(truth) == FACTORS
        assert max(truth.values()) < 0.06


def test_factors_see_a_dropped_mode():
    images, captions, found = objects_of('shapes-open')
    for factor, shown in modes(found).items():
        keep = np.setdiff1d(range(3000), found['image'][shown])
        distance = factors_of(keep, images, captions)
        assert distance[factor] > 0.2, (factor, distance)
    keep = np.flatnonzero(found['background'] != 1)
    for data in world.WORLDS:
        assert factors_of(keep, images, captions, data)['background'] > 0.2


def test_factors_see_objects_that_agree_with_each_other():
    images, captions, found = objects_of('shapes-open')

    def alike(factor, tasks):
        """The distances once the objects of an image agree in a factor, whose values stay free."""
        mixed = []
        for i, caption in enumerate(captions):
            task, objects, _ = world.parse_caption(caption)
            values = found[factor][found['image'] == i]
            if task in tasks and len(objects) > 1 and np.ptp(values) > 0:
                mixed.append(i)
        return factors_of(np.setdiff1d(range(3000), mixed), images, captions)

    sizes = alike('size', world.TASKS)
    colors = alike('color', ('two_object',))
    assert sizes['pairs'] == 0.5 and sizes['groups'] > 0.7 and sizes['size'] < 0.06
    assert colors['color pairs'] == 0.75 and colors['color'] < 0.06


def test_toy_features_react_to_every_factor():
    images, _, found = objects_of(n=8000)
    reference = metrics.toy_features(images[:3000])
    new = images[3000:]
    changed = dict(real=new, moved=torch.roll(new, 1, 3), recoloured=new[:, [1, 0, 2]],
                   blurred=F.avg_pool2d(new, 3, 1, 1),
                   background=objects_of('shapes-open', 4000)[0][3000:])
    for factor, shown in modes(found).items():
        kept = new[np.setdiff1d(range(5000), found['image'][shown] - 3000)]
        assert len(kept) >= 1000
        changed[f'no {factor}'] = kept
    rows = {}
    for name, some in changed.items():
        features = metrics.toy_features(some[:1000])       # as many for all: the same bias
        rows[name] = metrics.frechet_distance(features, reference)
    print('    ' + ', '.join(f'{name} {value:.1f}' for name, value in rows.items()))
    floor = rows.pop('real')
    assert all(value > 1.5 * floor for value in rows.values())


def test_captions_are_parsed_by_the_grammar():
    wanted = {
        'a red circle left of a blue square':
            ('position', [('red', 'circle'), ('blue', 'square')], 'left of'),
        'three green squares': ('counting', [('green', 'square')] * 3, ''),
        'a circle': ('single_object', [('', 'circle')], ''),
        'a yellow shape': ('colors', [('yellow', '')], '')}
    for caption, parts in wanted.items():
        assert world.parse_caption(caption) == parts


def test_unknown_words_are_explained_with_their_neighbours():
    outside = {
        'a red red': 'three green squares',
        'a circle and a square and a cross': 'outside the grammar',
        'two red circles and a blue square': 'a number stands alone',
        'two circles left of a square': 'a number stands alone',
        'two circles and two squares': 'a number stands alone'}
    for caption, words in outside.items():
        with exits_with('outside the grammar', words):
            world.parse_caption(caption)
    with exits_with("unknown word 'cirle'", 'nearest known: circle'):
        word_ids(['a cirle'], world.WORDS, 8)
    assert word_ids(['A red circle.'], world.WORDS, 8).equal(word_ids(['a red circle'], world.WORDS, 8))
    with exits_with('known: cat, dog'):
        word_ids(['xyzzy'], ('cat', 'dog'), 8)
    with exits_with('9 words', 'at most 8'):
        word_ids(['a ' * 9], world.WORDS, 8)


# -----------------------------------------------------------------------------
# Folders of images

def test_folder_reads_every_mode_and_names_bad_files_once(tmp_path):
    picture_folder(tmp_path)
    source = open_data(tmp_path, 16)
    assert source.words == ('cat', 'dog') and source.length == 13 and source.caption_length == 1
    with capture() as text:
        source.batch(range(13))
        source.batch(range(13))
    assert [os.path.basename(path) for path in source.bad] == ['truncated.png']
    assert text.getvalue().count('skipped') == 1
    assert all(f'skipped {path}: ' in text.getvalue() for path in source.bad)
    good = [i for i in range(13) if not source.is_bad(i)]
    pixels, captions = source.batch(good)
    assert pixels.shape == (12, 3, 16, 16) and captions.count('cat') == 6
    assert source.batch(range(13))[0].shape == (13, 3, 16, 16)     # good ones instead of bad ones


def test_grey_of_16_bits_and_transparency_are_seen_as_they_are_meant(tmp_path):
    picture_folder(tmp_path)
    grey = read_image(f'{tmp_path}/cat/grey.png', 16)
    grey16 = read_image(f'{tmp_path}/dog/grey16.png', 16)
    clear = read_image(f'{tmp_path}/dog/alpha.png', 16)
    assert (grey == grey16).all() and np.ptp(grey) > 20 and grey.shape == (16, 16, 3)
    assert (clear == 255).all()                            # fully transparent shows white


def test_folder_problems_are_explained(tmp_path):
    with exits_with('no such folder', "'shapes'"):
        open_data(f'{tmp_path}/nowhere', 32)
    with exits_with('no images found', 'sub-folders'):
        open_data(tmp_path, 32)
    open(f'{tmp_path}/notes.txt', 'w').write('x')
    with exits_with('no images found', 'left out: 1 not images by their ending (.txt)'):
        open_data(tmp_path, 32)
    Image.new('L', (9, 9)).save(f'{tmp_path}/good.png')
    for k in range(7):
        with exits_with(f'{k + 1} images found, expected at least 8'):
            open_data(tmp_path, 32)
        open(f'{tmp_path}/{k}.png', 'w').write('x')
    with capture() as text:
        open_data(tmp_path, 32)                            # a flat folder is one class
    assert 'single class' in text.getvalue()
    open(f'{tmp_path}/good.png', 'w').write('x')
    with exits_with('not one of its 8 files'):
        open_data(tmp_path, 32)
    with exits_with('multiples of 32 pixels, not 48', '--image_size=64'):
        open_data('shapes', 48)
    with exits_with('the model knows 1 (cat'):
        open_data('shapes', 32, expected=['cat'])


def test_numbered_classes_are_in_the_order_of_their_values_and_loose_files_left_out(tmp_path):
    for k in range(8):
        Image.new('L', (9, 9)).save(f'{tmp_path}/{k}.png')
        for name in ('10', '9', 'b'):
            os.makedirs(f'{tmp_path}/{name}', exist_ok=True)
            Image.new('L', (9, 9)).save(f'{tmp_path}/{name}/{k}.png')
    os.makedirs(f'{tmp_path}/empty')
    with capture() as text:
        source = open_data(tmp_path, 32)
    assert source.words == ('9', '10', 'b')
    assert 'left out: 8 outside the class folders' in text.getvalue()


def test_token_cache_is_never_stale(tmp_path):
    picture_folder(f'{tmp_path}/data')
    vq = small_tokenizer()

    def encode(flips=False):
        """-> rows of the table, caches that there are now."""
        tokens = token_data(open_data(f'{tmp_path}/data', 16), vq, tmp_path, CPU, flips=flips)
        assert isinstance(tokens, np.memmap) and tokens.shape[1] == 17
        return len(tokens), len(glob.glob(f'{tmp_path}/tokens-*.npy'))

    assert encode() == (12, 1)
    assert encode() == (12, 1)                             # used again
    Image.new('RGB', (20, 20), 'red').save(f'{tmp_path}/data/dog/new.png')
    assert encode() == (13, 2)
    vq.codebook.weight.data += 1
    assert encode() == (13, 3)
    assert encode(flips=True) == (26, 4)


def test_encoding_uses_small_integers_and_mirrors(tmp_path):
    picture_folder(f'{tmp_path}/data')
    bits = mini_tokenizer('maskbit')
    source = open_data(f'{tmp_path}/data', 16)
    table = token_data(source, bits, tmp_path, CPU, 5, flips=True)
    assert table.shape == (24, 33) and table.dtype == np.int8 and isinstance(table, np.memmap)
    good = [i for i in range(13) if not source.is_bad(i)]
    images = source.batch(good)[0]
    assert np.array_equal(table[::2, :32], bits.encode(images).numpy())
    assert np.array_equal(table[1::2, :32], bits.encode(images.flip(-1)).numpy())


def test_interrupted_encoding_resumes(tmp_path):
    picture_folder(f'{tmp_path}/data')
    bits = mini_tokenizer('maskbit')

    def encode(name):
        source = open_data(f'{tmp_path}/data', 16)
        return token_data(source, bits, f'{tmp_path}/{name}', CPU, 5, flips=True)

    whole = encode('whole')
    first = open_data(f'{tmp_path}/data', 16).batch(range(5))[0]
    ids = [bits.encode(first), bits.encode(first.flip(-1)), bits.encode(first)]
    with mock.patch.object(bits, 'encode', side_effect=[*ids, KeyboardInterrupt]):
        with contextlib.suppress(KeyboardInterrupt):       # in the second of three batches
            encode('again')
    assert not glob.glob(f'{tmp_path}/again/*.npy')
    with mock.patch.object(bits, 'encode', side_effect=bits.encode) as spy, capture() as text:
        table = encode('again')
    assert '1 of 13 files were skipped' in text.getvalue()
    assert spy.call_count == 4                             # two batches, each with its mirror images
    assert np.array_equal(table, whole)
    made = sorted(name[:7] for name in os.listdir(f'{tmp_path}/again'))
    assert made == ['images-', 'tokens-']                  # no leftovers


def test_every_source_has_the_same_members(tmp_path):
    picture_folder(tmp_path)
    for source in (open_data('shapes', 32, 64), open_data(tmp_path, 32)):
        index = source.examples(5)
        with capture():                                    # which names the bad files
            images, captions = source.batch(index)
        assert images.shape == (5, 3, 32, 32) and images.abs().max() <= 1
        ids = word_ids(captions, source.words, source.caption_length)
        assert ids.shape == (5, source.caption_length)
        assert captions_of(ids, source.words) == captions
        assert json.loads(json.dumps(source.key())) == source.key()
        for chosen in (source.training_examples(8), source.test_examples(8)):
            assert len(chosen) == 8
        assert max(source.training_examples(8)) < source.limit
        reference, others, name = source.reference_split(6)
        assert len(reference) == 6 and not set(reference) & set(others) and '6 ' in name
        for caption in captions:
            assert source.wrong_caption(caption, (0.5, 0.5, 0.5)) != caption
        assert set(source.tasks(captions)) <= set(source.task_names or [''])
        assert set(source.factors(images, captions)) <= FACTORS
        if source.judges:
            assert source.follows(images, captions).all()


# -----------------------------------------------------------------------------
# The training of the tokenizer

CHOSEN = """
import torch
def bincount(ids, minlength):
    return torch.arange(minlength).sub(3).abs()
torch.bincount = bincount
"""
DRAWN = """
import common.world as world
real = world.draw
def draw(index, *options):
    print('drawn', len(index), min(index), max(index))
    return real(index, *options)
world.draw = draw
"""


def test_codes_without_use_or_beside_a_busier_one_move_and_no_others(tmp_path):
    expected = {0.0: [3], 1e9: list(range(31))}            # how often: 3 2 1 0 1 ... 28
    for apart, codes in expected.items():
        must_run('tokenizer.py', f'--out_dir={tmp_path}', '--lr=0', '--steps=52', '--save_every=49',
                 '--overwrite', f'--apart={apart}', before=CHOSEN)
        before = torch.load(f'{tmp_path}/tokenizer.prev.pt')['net']    # of step 49
        after = torch.load(f'{tmp_path}/tokenizer.pt')['net']          # of step 52
        moved = (before.pop('codebook.weight') != after.pop('codebook.weight')).any(1)
        assert moved.nonzero()[:, 0].tolist() == codes
        same(before, after)


def test_tokenizer_trains_on_images_that_are_not_held_out_with_the_weight_on_the_commitment(tmp_path):
    text = must_run('tokenizer.py', '--overwrite', '--commitment=0', '--steps=8', f'--out_dir={tmp_path}',
                    before=DRAWN)
    calls = re.findall(r'drawn (\d+) (\d+) (\d+)', text)
    trained = [(int(first), int(last)) for n, first, last in calls if n == '8']
    assert len(trained) == 8                               # a batch of 8 per update
    for first, last in trained:
        assert 0 <= first <= last < world.HELD_OUT
    state = torch.load(f'{tmp_path}/tokenizer.pt')
    number = list(state['net']).index('codebook.weight')
    momentum = state['optimizer']['state'][number]['exp_avg']
    assert momentum.abs().max() > 0                        # the codebook's own term has no weight


# -----------------------------------------------------------------------------
# Seeds, optimizers

def test_micro_batches_draw_the_same_numbers_however_processes_share_them():
    alone = SimpleNamespace(rank=0, accumulate=4, device=CPU)
    second_of_two = SimpleNamespace(rank=1, accumulate=2, device=CPU)
    numbers = [torch.rand(3, generator=micro_rng(7, 5, k, alone)) for k in range(4)]
    shared = [torch.rand(3, generator=micro_rng(7, 5, k, second_of_two)) for k in range(2)]
    same(numbers[2:], shared)
    further = torch.rand(3, generator=micro_rng(7, 5, 2, alone, 'fresh'))
    assert len({x.sum().item() for x in (*numbers, further)}) == 5


def test_muon_equals_torchs():
    shapes = ((6, 4), (4, 4), (4, 9), (6, 4))
    ours = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Muon(ours, 0.1, 0.01, 0.8)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.8)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs):
        moved = (b - 1).norm()
        assert moved > 0.1 and (a - b).norm() < 0.02 * moved           # torch's is in bfloat16


def test_ema_is_the_weighted_mean_and_starts_fast():
    for step, decay in ((10 ** 6, 0.9), (0, 0.1)):
        average = small_model()
        network = small_model()
        network.bias.data += 1
        expected = decay * average.bias + (1 - decay) * network.bias
        ema_update(average, network, 0.9, step)
        assert torch.allclose(average.bias, expected)


def test_gradients_are_averaged_then_clipped():
    expected = {1.0: [-0.6, 0.0, -0.8], 0.0: [-3.0, 0.0, -4.0]}        # 0: no limit
    for clip, moved in expected.items():
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([6.0, 0.0, 8.0])             # the sum of two micro-batches
        norm = apply_gradients([p], [torch.optim.SGD([p], 1.0)], 2, clip)
        assert norm == 5
        assert torch.allclose(p.data, torch.tensor(moved), atol=1e-4)


def test_other_optimizers_than_the_saved_ones_are_explained():
    def made(muon_lr):
        return dict(net=make_optimizers(small_model(), muon_lr, 1e-3, (0.9, 0.99)))

    states = optimizer_states(made(0.01))
    states[0]['param_groups'][0]['fused'] = True           # as saved on a GPU
    optimizers = made(0.01)
    restore_optimizers(optimizers, states, 'x.pt')
    assert optimizers['net'][0].param_groups[0]['fused'] is False
    with exits_with('x.pt: its optimizers', 'Muon'):
        restore_optimizers(made(0), states, 'x.pt')


# -----------------------------------------------------------------------------
# Metrics

def test_frechet_distance_equals_scipys_and_its_closed_forms():
    source = rng()

    def normal(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    x = normal(400, 8) @ normal(8, 8)
    y = normal(400, 8) @ normal(8, 8)
    s1 = np.cov(x.T.numpy())
    s2 = np.cov(y.T.numpy())
    gap = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = gap + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(metrics.frechet_distance(x, y) - expected) < 1e-6 * expected
    assert abs(metrics.frechet_distance(x, x + 3) - 8 * 9) < 1e-6      # equal covariances
    thin = x[:5]                                           # five points: covariances of rank 4
    moments = thin.float().numpy().mean(0), np.cov(thin.T.numpy())
    assert abs(metrics.frechet_distance(thin, thin)) < 1e-9
    assert abs(metrics.frechet_distance(thin, moments)) < 1e-6


def test_what_is_measured_is_held_out_and_apart_from_its_reference():
    source = open_data('shapes', 32)
    with mock.patch.object(source, 'batch', wraps=source.batch) as drawn:
        metrics.Reference(source, UNTRAINED, 10).prompts(20)
    reference, measured = [{int(i) for i in call.args[0]} for call in drawn.call_args_list]
    assert len(reference) == 10 and len(measured) == 20
    assert min(reference | measured) >= world.HELD_OUT
    assert not reference & measured


def test_a_distance_has_no_bias_and_an_honest_standard_error():
    source = rng()

    def drawn(n, mean, scale):
        return mean + scale * torch.randn(n, 8, generator=source, dtype=torch.float64)
    truth = 8 * (0.1 ** 2 + 0.2 ** 2)
    for n, draws in ((100, 40), (1000, 20)):
        plain, values, errors = [], [], []
        for _ in range(draws):
            x = drawn(n, 0.1, 1.2)
            y = drawn(2 * n, 0, 1)
            blocks = metrics.distance_by_block(x, y)
            plain.append(metrics.frechet_distance(x, y))
            values.append(blocks.mean())
            errors.append(metrics.standard_error(blocks))
        spread = np.std(values)
        assert abs(np.mean(values) - truth) < 3 * spread / draws ** 0.5
        assert 0.7 < np.mean(errors) / spread < 1.5, (np.mean(errors), spread)
        if n == 100:
            assert np.mean(plain) - truth > 10 * spread / draws ** 0.5     # what is taken off
    few = metrics.distance_by_block(drawn(4, 0, 1), drawn(5, 0, 1))
    assert len(few) == 4 and np.isfinite(few).all()
    shares = metrics.share_by_block(np.arange(400) < 100)
    assert len(shares) == 20 and np.allclose(shares, 0.25)


def test_a_difference_below_two_standard_errors_is_a_tie():
    noise = np.random.RandomState(0).standard_normal(20)
    other = np.random.RandomState(1).standard_normal(20)

    def row(name, values, passes=1):
        keys = dict.fromkeys(metrics.MEASURES)
        measured = {key: float(values.mean()) for key in keys}
        error = {key: metrics.standard_error(values) for key in keys}
        return dict(name=name, passes=passes, ms=0.0, n=10, reference='', error=error,
                    blocks={key: values.tolist() for key in keys}, **measured)
    base = row('a', 5 + noise)
    near, far, paired = row('b', 5.3 + other), row('c', 7 + other), row('d', 5.3 + 1.01 * noise)
    assert metrics.is_tie(base, base, 'reader') and metrics.is_tie(base, near, 'reader')
    assert not metrics.is_tie(base, far, 'reader') and not metrics.is_tie(base, paired, 'reader')
    fewer = row('e', 5.3 + other[:10])                     # of fewer blocks: not block by block
    assert metrics.is_tie(base, fewer, 'reader')
    text = printed(metrics.show_table, [base, near, far, paired])
    assert 'ties in reader: a = b\n' in text and '±' in text
    many = [base, near, far, paired, fewer, row('f', far['reader'] + noise), row('g', 3 + noise)]
    assert 'ties in reader: none\n' in printed(metrics.show_table, many)  # g is best, alone
    unknown = metrics.NoReference(None).measure([], [])
    assert not metrics.is_tie(unknown, unknown, 'reader')


def test_a_slow_sampler_is_measured_on_a_quarter_of_the_images(tmp_path):
    reference = metrics.Reference(open_data('shapes', 32), UNTRAINED, 40)
    captions, real = reference.prompts(80)

    def drawn(sample, loaded, captions, seed):
        return real[:len(captions)], 1.0
    samplers = {'fast': (metrics.MANY_PASSES, None), 'slow': (metrics.MANY_PASSES + 1, None)}
    with mock.patch.multiple(metrics, render=drawn, encode_images=mock.Mock(), decode_images=lambda *_: real):
        text = printed(metrics.final_table, f'{tmp_path}/x', samplers, mock.Mock(), reference, 80, 0, {})
    rows = json.load(open(f'{tmp_path}/x.json'))['rows']
    assert [row['n'] for row in rows] == [80, 80, 80, 20] and 'slow' in text


def test_what_lies_where_is_what_the_checker_sees():
    index = np.arange(200)
    for data in world.WORLDS:
        facts = open_data(data, 32).facts(index)
        found = world.look(open_data(data, 32).batch(index)[0])
        assert facts.shape == (200, 75) and facts.dtype == bool
        assert (facts[:, -4:].argmax(1) == found['background']).all()
        assert (facts[:, -8:-4].argmax(1) + 1 == np.bincount(found['image'])).all()
        places = np.zeros((200, 5, 5), dtype=bool)
        places[found['image'], found['row'] // 4 - 2, found['column'] // 4 - 2] = True
        kinds = np.zeros((200, 4, 4, 2), dtype=bool)
        kinds[found['image'], found['color'], found['shape'], found['size']] = True
        assert (np.concatenate([places.reshape(200, 25), kinds.reshape(200, 32)], 1) == facts[:, :57]).all()
        for column, name in enumerate(['color'] * 4 + ['shape'] * 4 + ['size'] * 2, 57):
            first = dict(color=57, shape=61, size=65)[name]
            with_it = found['image'][found[name] == column - first]
            assert (np.flatnonzero(facts[:, column]) == np.unique(with_it)).all()


def quick_reader(**constants):
    """A reader is trained in a moment."""
    recipe = dict(STEPS=3, N_IMAGES=200, BATCH=8)
    recipe.update(constants)
    return mock.patch.multiple(reader, **recipe)


def test_the_reader_is_made_once_for_its_data_whatever_else_was_drawn(tmp_path):
    source = open_data('shapes', 32)
    with quick_reader():
        torch.manual_seed(1)
        drawn = torch.rand(2)
        text = printed(reader.load_reader, source, f'{tmp_path}/a')
        assert 'training the network that reads the images' in text
        assert printed(reader.load_reader, source, f'{tmp_path}/a') == ''
        torch.manual_seed(1)
        with capture():
            again = reader.load_reader(source, f'{tmp_path}/b')
            assert torch.equal(drawn, torch.rand(2))       # the run draws as if there were no reader
            other = reader.load_reader(open_data('shapes-open', 32), f'{tmp_path}/a')
        one = reader.load_reader(source, f'{tmp_path}/a')
        same(one.state_dict(), again.state_dict())
        assert other.config != one.config and len(glob.glob(f'{tmp_path}/a/*.pt')) == 2
        features = one.features(source.batch(source.reader_examples(200))[0])
        assert features.dtype == torch.float64 and features.mean(0).abs().max() < 1e-6
        covariance = torch.cov(features.T)
        near(covariance, covariance.diagonal().diag(), 1e-6)
        near(covariance.diagonal()[-5:], torch.ones(5, dtype=torch.float64), 1e-6)
        assert covariance.diagonal().max() < 1 + 1e-6
        path = f'{tmp_path}/b/reader-{reader.key_of(source)}.pt'
        save_checkpoint(path, dict(load_checkpoint(path), key='other', data='cats'))
        with exits_with(path, 'of other images (cats)'):
            reader.load_reader(source, f'{tmp_path}/b')
        seen = source.reader_examples(20_000)
        for index in (source.examples(99), source.test_examples(10 ** 5), *source.reference_split(50_000)[:2]):
            assert index.max() < seen.min()
    with quick_reader(STEPS=4):
        assert reader.key_of(source) not in path           # another recipe, another file


def test_the_reader_tells_spoilt_sets_from_clean_ones():
    source = open_data('shapes', 32)
    with mock.patch.multiple(reader, STEPS=700, N_IMAGES=10_000):      # two thirds of its training
        net = reader.train_reader(source)
    n = 4000
    clean, spoilt = power.spoilt_tenths(power.FIRST, n, power.mix_pixels)
    assert len(spoilt) == 6
    for rows, images in spoilt.values():
        changed = (images != clean[rows]).flatten(1).any(1)
        assert len(rows) == len(set(rows)) == n // 10 and changed.double().mean() > 0.9
    others = source.batch(np.arange(power.FIRST + 10 ** 6, power.FIRST + 10 ** 6 + n))[0]
    wanted = source.batch(source.reference_split(8000)[0])[0]
    table = power.separations(net.features, clean, spoilt, others, wanted)
    print('    ' + ', '.join(f'{name} {apart:.1f} / {rival:.1f}' for name, (_, _, apart, rival) in table.items()))
    distance, error, _, rival = table.pop('nothing')
    assert abs(distance) < 3 * error and abs(rival) < 3
    assert all(apart > 3 for _, _, apart, _ in table.values())


def test_precision_and_recall_of_known_sets():
    source = rng()
    real = torch.randn(1200, 4, generator=source, dtype=torch.float64)
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(real, real + 100) == (0.0, 0.0)
    noise = torch.randn(500, 4, generator=source, dtype=torch.float64)
    precision, recall = metrics.precision_recall(real, real[:1] + 1e-4 * noise)    # collapsed
    assert precision > 0.95 and recall < 0.05
    fake = real[:300] + 0.5
    radius = torch.cdist(real, real).sort(1).values[:, 3]
    brute = (torch.cdist(fake, real) < radius).any(1).double().mean()
    assert abs(metrics.precision_recall(real, fake)[0] - brute) < 1e-12
    far = [(1000 + x).float() for x in (real, fake)]       # float32, far from zero
    exact = [x.double() for x in far]
    assert metrics.precision_recall(*far) == metrics.precision_recall(*exact)


def test_partial_sums_of_features_merge_to_one_pass():
    x = torch.randn(700, 12, dtype=torch.float64) * 3 + 5
    moments = metrics.Moments(12)
    for part in x.split(90):
        moments.add(part)
    mean, covariance = moments.result()
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(covariance, torch.cov(x.T))
    y = torch.randn(500, 12, dtype=torch.float64)
    of_moments = metrics.frechet_distance((mean, covariance), y)
    assert abs(of_moments - metrics.frechet_distance(x, y)) < 1e-6


def test_inception_score_of_uniform_is_1_and_of_balanced_one_hots_is_the_number_of_classes():
    assert abs(metrics.inception_score(torch.full((100, 8), 1 / 8)) - 1) < 1e-9
    labels = metrics.balanced_labels(8000, 8, 0)
    assert torch.bincount(labels).eq(1000).all()
    assert not torch.equal(labels[:8], torch.arange(8))
    one_hots = F.one_hot(labels, 8).float()
    assert abs(metrics.inception_score(one_hots, 4000) - 8) < 1e-6
    odd = metrics.balanced_labels(4001, 8, 0)          # a last split of one image would have IS 1
    assert metrics.inception_score(F.one_hot(odd, 8).float(), 4000) > 7.99
    in_order = F.one_hot(labels.sort().values, 8).float()
    assert metrics.inception_score(in_order, 1000) < 1.01  # why the order is random


def test_precision_of_one_real_image_over_and_over_is_1_and_its_recall_0(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 255, (40, 4, 4, 3), dtype=np.uint8)
    one = torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2) / 127.5 - 1

    def network(x):
        """uint8 images -> three features, two equal probabilities."""
        return x.float().mean((2, 3)), torch.ones(len(x), 2) / 2

    def decode(tokens, captions):
        assert len(tokens) == len(captions)
        return one.expand(len(tokens), -1, -1, -1)

    def encode(captions):
        return torch.tensor([int(caption) for caption in captions])

    def draw(cond, rngs):
        return cond

    loaded = SimpleNamespace(tokenizer=SimpleNamespace(batch=2, decode=decode), encode=encode,
                             device=CPU)
    captions = [str(k) for k in range(12)]
    np.savez(f'{tmp_path}/ref.npz', mu=np.zeros(3), sigma=np.eye(3), arr_0=pixels)
    reference = metrics.read_reference(f'{tmp_path}/ref.npz', network, CPU, 7)
    row, features = metrics.inception_metrics(draw, loaded, captions, network, reference, 0, 5)
    assert set(row) == {'FID@12', 'IS'}
    assert metrics.late_metrics(reference.features, features) == dict(precision=1, recall=0)
    for lack in (RuntimeError('out of memory'), MemoryError()):
        with mock.patch.object(metrics, 'precision_recall', side_effect=lack), capture() as text:
            assert metrics.late_metrics(reference.features, features) == {}
        assert 'no precision and recall: ' in text.getvalue()


def three_features(x):
    """uint8 images -> three features, two equal probabilities."""
    return x.float().mean((2, 3)), torch.ones(len(x), 2) / 2


def test_everything_of_a_reference_is_checked_at_once(tmp_path):
    path = f'{tmp_path}/ref.npz'
    good = dict(mu=np.zeros(3), sigma=np.eye(3), arr_0=np.zeros((5, 4, 4, 3), np.uint8))
    for save in (np.savez, np.savez_compressed):
        save(path, **good)
        assert metrics.read_reference(path, three_features, CPU, 2).features.shape == (5, 3)
    cases = {
        'mu.npy': dict(mu=None), 'mu.npy is (4,)': dict(mu=np.zeros(4)), 'not finite': dict(mu=np.full(3, np.inf)),
        'sigma.npy is (2, 2)': dict(sigma=np.eye(2)), 'symmetric': dict(sigma=np.triu(np.ones((3, 3)))),
        'negative variance': dict(sigma=np.diag([1., 1, -1])), 'a negative variance': dict(sigma=np.ones((3, 3)) - np.eye(3)),
        'of float64': dict(arr_0=np.zeros((5, 4, 4, 3))), '(5, 3, 4, 4)': dict(arr_0=np.zeros((5, 3, 4, 4), np.uint8)),
        '(5, 2048)': dict(arr_0=np.zeros((5, 2048), np.uint8)), 'of object': dict(arr_0=np.array([{}])),
        '4 to 100000': dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8)), 'column by column': dict(arr_0=np.asfortranarray(good['arr_0']))}
    for words, changes in cases.items():
        arrays = {key: value for key, value in {**good, **changes}.items() if value is not None}
        np.savez(path, **arrays)
        with exits_with(f'--ref={path}', words):
            metrics.read_reference(path, three_features, CPU, 2)
    write_npz(path, (10 ** 9, 256, 256, 3), [], mu=good['mu'], sigma=good['sigma'])    # says so, and holds nothing
    with exits_with(f'--ref={path}', 'in 0 bytes'):
        metrics.read_reference(path, three_features, CPU, 2)
    np.savez(path, **good)
    whole = pathlib.Path(path).read_bytes()
    place = whole.index(b'arr_0.npy') + 300            # among the zeros
    for broken in (whole[:place] + b'1' + whole[place + 1:], whole[:-50], b'', b'text'):
        pathlib.Path(path).write_bytes(broken)
        with exits_with(f'--ref={path}'):
            metrics.read_reference(path, three_features, CPU, 2)


def test_statistics_of_a_folder_are_those_of_its_readable_images(tmp_path):
    picture_folder(tmp_path / 'data')
    path = f'{tmp_path}/ref.npz'
    with capture():
        source = open_data(f'{tmp_path}/data', 16)
        mean, covariance, good = metrics.folder_moments(source, three_features, CPU, 5)
        write_npz(path, (len(good), 16, 16, 3), metrics.folder_pixels(source, good, 5), mu=mean, sigma=covariance)
    pixels = np.load(path)['arr_0']
    assert pixels.shape == (12, 16, 16, 3)             # not the two bad files
    features = pixels.mean((1, 2), dtype=np.float64)
    assert np.allclose(mean, features.mean(0)) and np.allclose(covariance, np.cov(features.T))
    assert metrics.read_reference(path, three_features, CPU, 5).features.shape == (12, 3)
    with exits_with('is there already'):
        check_new('ref', path)


def test_a_file_that_is_no_inception_network_or_another_is_explained(tmp_path):
    path = f'{tmp_path}/net.pth'
    torch.save({}, path)
    digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    with exits_with('net.pth', 'TorchScript'), capture() as text:
        metrics.load_inception(path, 'cpu', digest.upper())
    assert digest in text.getvalue()
    with mock.patch.object(torch.jit, 'load') as run, exits_with(digest, '--inception_sha256=12'), capture() as text:
        metrics.load_inception(path, 'cpu', '12')
    assert digest in text.getvalue() and not run.called
    with exits_with('no.pt'):
        metrics.load_inception(f'{tmp_path}/no.pt', 'cpu')


# -----------------------------------------------------------------------------
# Pictures

def test_a_caption_that_no_font_has_is_a_number_and_a_note_tells_it(tmp_path):
    path = f'{tmp_path}/x.png'
    captions = ['a cat', '\u732b', 'a cat', '\u732b']
    with mock.patch.object(pictures, 'system_fonts', return_value=[]):
        pictures.font_for.cache_clear()
        pictures.NOTED.clear()
        text = printed(pictures.save_grid, path, torch.zeros(4, 3, 8, 8), captions)
        assert 'letters of 1 captions' in text and '[1] \u732b' in text
        assert printed(pictures.save_grid, path, torch.zeros(4, 3, 8, 8), captions) == ''
        numbered = np.asarray(Image.open(path))
        pictures.save_grid(path, torch.zeros(4, 3, 8, 8), ['a cat', '[1]', 'a cat', '[1]'])
        assert np.array_equal(numbered, np.asarray(Image.open(path)))
    pictures.font_for.cache_clear()
    for n, columns in ((1, 1), (3, 3), (9, 8)):        # no white column
        pictures.save_grid(path, torch.zeros(n, 3, 96, 96))
        assert Image.open(path).width == 100 * columns


# -----------------------------------------------------------------------------
# Published transformers and tokenizers

def conditions(network, inputs):
    """By the golden files' names: labels as they are, some of them dropped, all of them."""
    labels = inputs['labels']
    some = torch.where(inputs['drop_label'], network.n_words, labels)
    return {'cond': labels, 'drop': some, 'uncond': network.null(labels)}


def subcodes(index, bits):
    """Full indices (B, L) -> the two sub-token ids of every position (B, 2 L), low bits first."""
    half = bits // 2
    return torch.stack([index % 2 ** half, index >> half], -1).flatten(1)


@torch.no_grad()
def test_maskgit_transformer_equals_the_golden_logits():
    file = golden('maskgit_transformer')
    tokens = file['inputs']['tokens'].flatten(1)
    outputs = dict(cond='logits', drop='logits_drop', uncond='logits_all_drop')
    students = file['checkpoint']['model_state_dict']      # flat, as Di[M]O's student
    for weights in (file['checkpoint'], students):
        network = MDM.from_pretrained('maskgit', weights, n_head=4)
        for name, cond in conditions(network, file['inputs']).items():
            expected = file['outputs'][outputs[name]][..., :32]        # the mask's logit dropped
            near(network(tokens, cond), expected)
            near(network(tokens, cond[:, None]), expected)


@torch.no_grad()
def test_maskbit_generators_equal_the_golden_logits():
    for file_name, bits in (('maskbit_generator', 6), ('maskbit_generator_14bit', 14)):
        file = golden(file_name)
        outputs = file['outputs']
        tokens = file['inputs']['tokens'].flatten(1)
        split = subcodes(file['inputs']['index'], bits)
        assert torch.equal(split, outputs['split'].flatten(1))
        for prefix in ('input_proj', 'token_emb'):         # the latter in some released files
            weights = {}
            for key, value in file['state_dict'].items():
                weights[key.replace('input_proj', prefix)] = value
            network = MDM.from_pretrained('maskbit', weights, n_head=4)
            bits_in = F.embedding(tokens, network.codes).view(3, 16, bits)
            assert torch.equal(bits_in, outputs['bits_in'])
            for name, cond in conditions(network, file['inputs']).items():
                near(network(tokens, cond), outputs[f'logits_{name}'].flatten(1, 2))


def test_taming_vqgan_equals_the_golden_images():
    file = golden('taming_vqgan')
    inputs = file['inputs']
    outputs = file['outputs']
    vqgan = Tokenizer.from_pretrained('maskgit', file['checkpoint'])
    near(vqgan.decode(inputs['code'].flatten(1)), outputs['image_from_code'])
    near(vqgan.latents(inputs['image']), outputs['encoder_out'].flatten(2).transpose(1, 2))
    assert torch.equal(vqgan.encode(inputs['image']), outputs['indices'].flatten(1))


def test_maskbit_tokenizers_equal_the_golden_images():
    for name in ('maskbit_tokenizer', 'maskbit_tokenizer_3level'):
        file = golden(name)
        inputs = file['inputs']
        outputs = file['outputs']
        bits = Tokenizer.from_pretrained('maskbit', file['state_dict'])
        images = inputs['image'] * 2 - 1                   # the file's lie in [0, 1]
        near(bits.latents(images).view(2, -1, 6), outputs['encoder_out'].flatten(2).transpose(1, 2))
        ids = bits.encode(images)
        assert torch.equal(ids, subcodes(outputs['indices'].flatten(1), 6))
        codes = F.embedding(ids, bits.codes).view(2, -1, 6)
        assert torch.equal(codes, outputs['quantised'].flatten(2).transpose(1, 2))
        near((bits.decode(ids) + 1) / 2, outputs['reconstruction'])
        again = bits.decode(subcodes(inputs['indices'], 6))
        near((again + 1) / 2, outputs['image_from_indices'])


def test_sampling_plans_equal_the_golden_tables():
    tables = golden('schedules')
    assert len(tables['maskgit']) > 0
    for name, table in tables['maskgit'].items():
        expected = torch.as_tensor(table['tokens_unmasked_at_step']).tolist()
        assert reveal_counts(len(expected), sum(expected)) == expected, name
    released = {'14bit_64steps': (7.1, 3.0), '14bit_128steps': (7.1, 3.0),
                '14bit_256steps': (5.8, 3.0), '10bit_64steps': (6.4, 2.5)}
    for name, (scale, power) in released.items():
        table = tables['maskbit'][name]
        masked = table['masked_before_step'].tolist()
        plan = sampling_plan(len(masked), 512, 'maskbit', power)
        assert plan.counts == [a - b for a, b in zip(masked, masked[1:] + [0])]
        guidance = scale * torch.tensor(plan.guidance)
        assert (guidance - table['guidance_scale']).abs().max() < 1e-5
        assert plan.noise[-1] == 0
    with exits_with('power = -1', 'expected 0 or more'):   # its guidance would be NaN
        sampling_plan(4, 16, 'maskbit', -1)


def parameters_of(network):
    return sum(p.numel() for p in network.parameters())


def test_published_sizes_have_the_published_parameter_counts():
    unused = 257 * 2026 - 256 * 1024                       # biases of MaskGIT that we drop
    bit_totals = {5: 304_728_128, 7: 304_929_024, 9: 305_720_320}      # by the bits of a token
    with torch.device('meta'):
        maskgit = MDM(**TRANSFORMERS['maskgit'])
        assert parameters_of(maskgit) == 174_160_874 - unused
        for bits, total in bit_totals.items():
            sizes = dict(TRANSFORMERS['maskbit'], V=2 ** bits, bits=bits)
            assert parameters_of(MDM(**sizes)) == total
        vqgan = Tokenizer(**TOKENIZERS['maskgit'])
        assert parameters_of(vqgan) == 72_141_699
        bits = Tokenizer(**TOKENIZERS['maskbit'])
        assert parameters_of(bits) == 54_489_489 and (bits.N, bits.V) == (512, 128)


def test_other_sizes_of_transformers_are_read_off_the_shapes():
    sizes_of = [
        ('maskgit', dict(N=9, V=64, D=48, depth=1, mlp=100, n_words=7, n_head=3)),
        ('maskgit', dict(N=4, V=512, n_words=1000, D=16, n_head=2)),
        ('maskgit', dict(V=1024, n_words=300)),
        ('maskgit', dict(V=128, n_words=1000)),
        ('maskbit', dict(N=50, V=32, bits=5, D=24, depth=3, n_head=3, mlp=17)),
        ('maskbit', dict(N=9, V=16, bits=4, S=1)),
        ('maskbit', dict(N=27, V=8, bits=3, S=3)),
        ('maskbit', dict(N=18, V=512, bits=9, n_words=1000))]
    for kind, sizes in sizes_of:
        network = mini(kind, **sizes)
        weights = published(network, kind)
        again = MDM.from_pretrained(kind, weights, n_head=sizes.get('n_head'))
        assert again.config == network.config
        ids = torch.randint(network.V + 1, (2, network.N))
        cond = torch.randint(7, (2, 1))
        assert torch.equal(network(ids, cond), again(ids, cond))


def test_the_number_of_codes_in_a_maskgit_file_is_a_guess_that_can_be_told():
    odd = mini('maskgit', V=24, n_words=5)
    weights = published(odd, 'maskgit')
    assert MDM.from_pretrained('maskgit', weights, V=24).config == odd.config
    with exits_with('V + K + 2 with V = 0'):
        MDM.from_pretrained('maskgit', weights, V=0)
    with capture() as text:
        MDM.from_pretrained('maskgit', weights)
    assert 'is a guess' in text.getvalue()


def test_other_sizes_of_tokenizers_are_read_off_the_shapes():
    sizes_of = [
        ('maskgit', dict(ch_mult='2,1', attention='0,1,mid', n_res=2, up=3, z=4, n_codes=10)),
        ('maskgit', dict(ch_mult='1,3,2,2', attention='mid')),
        ('maskbit', dict(ch_mult='3,1,2', n_res=2, up=2, mid=3)),
        ('maskbit', dict(code_dim=9, n_codes=512)),
        ('maskbit', dict(code_dim=5, S=1, n_codes=32))]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for kind, sizes in sizes_of:
        made = mini_tokenizer(kind, **sizes)
        again = Tokenizer.from_pretrained(kind, published(made, kind), made.grid)
        assert again.config == made.config
        ids = torch.randint(made.V, (2, made.N))
        assert torch.equal(made.decode(ids), again.decode(ids))
        assert torch.equal(made.encode(images), again.encode(images))


def test_loading_copies_the_weights_and_reads_files_folders_and_dicts_alike(tmp_path):
    weights = published(mini('maskbit'), 'maskbit')
    file = f'{tmp_path}/generator.bin'
    old = f'{tmp_path}/old.bin'
    torch.save(weights, file)
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    networks = [MDM.from_pretrained('maskbit', source) for source in (file, old, weights)]
    os.remove(old)
    networks.append(MDM.from_pretrained('maskbit', tmp_path))
    for network in networks[1:]:
        same(network.state_dict(), networks[0].state_dict())
    kept = weights['pos_emb'].clone()
    for network in networks:
        network.pos_emb.data += 1                          # training touches neither dict nor file
    assert torch.equal(weights['pos_emb'], kept)
    assert torch.equal(MDM.from_pretrained('maskbit', tmp_path).pos_emb, kept)
    zeros = {key: value * 0 for key, value in weights.items()}
    torch.save(zeros, file)
    assert torch.equal(networks[0].pos_emb, kept + 1)      # no mapping of the file is left


LOADERS = [(MDM.from_pretrained, 'maskgit', mini), (MDM.from_pretrained, 'maskbit', mini),
           (Tokenizer.from_pretrained, 'maskgit', mini_tokenizer),
           (Tokenizer.from_pretrained, 'maskbit', mini_tokenizer)]


def test_a_file_of_another_kind_is_explained(tmp_path):
    paths = []
    for k, (_, kind, make) in enumerate(LOADERS):
        paths.append(f'{tmp_path}/{k}.pt')
        torch.save(published(make(kind), kind), paths[k])
    for k, (load, kind, _) in enumerate(LOADERS):
        for path in paths[:k] + paths[k + 1:]:
            with exits_with(path, 'expected', kind, 'right file'):
                load(kind, path)
        with exits_with("'magic'", 'maskgit, maskbit'):
            load('magic', paths[k])


def test_lost_changed_and_foreign_weights_are_explained():
    for load, kind, make in LOADERS:
        weights = published(make(kind), kind)
        flat = weights.get('model_state_dict', weights)
        for key in list(flat)[::7]:
            lost = dict(flat)
            del lost[key]
            changed = {**flat, key: flat[key][..., None]}
            for broken in (lost, changed):
                with exits_with('the given dict', 'expected'):
                    load(kind, broken)
        with exits_with('no tensors'):
            load(kind, {})
    with exits_with('no tensors'):
        MDM.from_pretrained('maskgit', {'state_dict': None, 5: torch.ones(1)})


def test_files_that_are_truncated_missing_or_no_weights_are_explained(tmp_path):
    whole = f'{tmp_path}/whole.pt'
    half = f'{tmp_path}/half.pt'
    text = f'{tmp_path}/text.pt'
    open(text, 'w').write('<html>')
    for load, kind, make in LOADERS:
        torch.save(published(make(kind), kind), whole)
        content = open(whole, 'rb').read()
        open(half, 'wb').write(content[:len(content) // 2])
        with exits_with(half, 'truncated'):
            load(kind, half)
        with exits_with(text, 'not a weight file'):
            load(kind, text)
        with exits_with(f'{tmp_path}: holds', 'weight files', 'name the file'):
            load(kind, tmp_path)
        with exits_with(f'{tmp_path}/nowhere.pt: no such file'):
            load(kind, f'{tmp_path}/nowhere.pt')


def test_widths_that_do_not_fit_are_explained():
    narrow = published(mini('maskgit', D=24, n_head=3), 'maskgit')
    with exits_with('16 heads', 'n_head'):
        MDM.from_pretrained('maskgit', narrow)
    with exits_with('-4 heads', 'n_head'):
        MDM.from_pretrained('maskgit', narrow, n_head=-4)
    odd = published(mini_tokenizer('maskbit'), 'maskbit')
    odd['encoder.conv_in.weight'] = torch.ones(33, 3, 3, 3)
    with exits_with('the given dict: encoder.conv_in', '33', 'right file'):
        Tokenizer.from_pretrained('maskbit', odd)


class Callback:
    """A foreign class, as a Lightning checkpoint carries one."""

    def __init__(self, path):
        self.path = path
        self.best = torch.ones(2)


class Settings(dict):
    """Another, which a file fills item by item."""


class Names(list):
    """Another, which a file fills by appending."""


def test_foreign_classes_become_inert(tmp_path):
    vqgan = mini_tokenizer('maskgit')
    weights = {**published(vqgan, 'maskgit'), 'loss.perceptual.weight': torch.ones(3)}
    callbacks = {Callback: Callback(tmp_path), 'score': np.float64(0.5)}
    callbacks['counts'] = collections.defaultdict(list, a=[1])
    callbacks['names'] = Names('ab')
    callbacks['names'].path = 'x'                          # an attribute of a list
    callbacks['name'] = Names('a')
    path = f'{tmp_path}/last.ckpt'
    torch.save(dict(epoch=1, callbacks=callbacks, hyper=Settings(lr=1), state_dict=weights), path)
    built = AssertionError('a foreign class was built')
    with mock.patch.object(Callback, '__new__', side_effect=built):
        again = Tokenizer.from_pretrained('maskgit', path)
    same(again.state_dict(), vqgan.state_dict())
    torch.save(dict(state_dict=weights, callbacks=callbacks), path, _use_new_zipfile_serialization=False)
    with exits_with(path, 'refused, an old file', 'Callback', 'state dict alone'):
        Tokenizer.from_pretrained('maskgit', path)


def test_a_network_is_found_in_any_nest_and_behind_any_prefix(tmp_path):
    net = mini('maskbit')
    weights = published(net, 'maskbit')
    wrong = {key: value + 1 for key, value in weights.items()}
    optimizer = {'state': {0: {'exp_avg': torch.ones(3)}}}

    def behind(prefix, state=weights):
        return {prefix + key: value for key, value in state.items()}
    states = [{nest: weights, 'opt': optimizer} for nest in ('ema', 'params_ema', 'generator', 'any name')]
    states += [behind(prefix) for prefix in ('module.', '_orig_mod.', '_orig_mod.module.', 'model.')]
    states.append({'hyper': {'lr': 1}, 'models': [{'net': behind('module.')}]})
    states.append({'state_dict': {**behind('model.'), **{f'model_ema.{key}'.replace('.', ''): value
                                                         for key, value in wrong.items()}}})
    several = [{'model': wrong, 'model_ema': weights}, {**behind('online.', wrong), **behind('ema_model.')}]
    path = f'{tmp_path}/x.pt'
    for state in states + several:
        torch.save(state, path)
        with capture() as text:
            for source in (state, path):
                same(MDM.from_pretrained('maskbit', source).state_dict(), net.state_dict())
        assert ('holds this network 2 times' in text.getvalue()) == (state in several)
    assert 'ema_model. is taken' in text.getvalue()
    save_safetensors(behind('module.'), f'{tmp_path}/x.safetensors')
    same(MDM.from_pretrained('maskbit', f'{tmp_path}/x.safetensors').state_dict(), net.state_dict())
    with exits_with('pos_emb', 'is missing', 'begins with a, b (2 in all)'):
        MDM.from_pretrained('maskbit', {'state_dict': dict(a=torch.ones(1), b=torch.ones(1))})


def rezip(source, path, kind, swap=False):
    """Pack a file of torch.save once more, in other ways than torch does; `swap`: as a machine of
    the other byte order writes its float32."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(path, 'w', kind) as after:
        for name in before.namelist():
            content = before.read(name)
            if swap and '/data/' in name:
                content = np.frombuffer(content, '<f4').astype('>f4').tobytes()
            if swap and name.endswith('/byteorder'):
                content = b'big'
            after.writestr(name, content)


def test_compressed_files_and_those_of_the_other_byte_order_are_read(tmp_path):
    net = mini('maskbit')
    torch.save(published(net, 'maskbit'), f'{tmp_path}/x.pt')
    save_checkpoint(f'{tmp_path}/ours.pt', dict(stage='model', config=dict(tau=0.5), w=torch.randn(99)))
    path = f'{tmp_path}/y.pt'
    for kind, swap in ((zipfile.ZIP_DEFLATED, False), (zipfile.ZIP_STORED, True), (zipfile.ZIP_LZMA, True)):
        rezip(f'{tmp_path}/x.pt', path, kind, swap)
        same(MDM.from_pretrained('maskbit', path).state_dict(), net.state_dict())
        assert not can_be_mapped(path)
        if kind != zipfile.ZIP_LZMA:                       # which torch does not know
            rezip(f'{tmp_path}/ours.pt', path, kind, swap)
            same(load_checkpoint(path)['w'], load_checkpoint(f'{tmp_path}/ours.pt')['w'])
            assert settings_of(path, ('tau',)) == dict(tau=0.5)


def test_weights_that_are_no_plain_finite_numbers_are_one_line_with_the_key(tmp_path):
    weights = published(mini('maskbit'), 'maskbit')
    key = 'class_emb.weight'
    value = weights[key]
    odd = {'NaN': value * np.nan, 'infinite': value / 0, 'int8': value.to(torch.int8), 'bool': value > 0,
           'complex64': value.to(torch.complex64), 'sparse': value.to_sparse(), 'meta': value.to('meta'),
           'nested': torch.nested.nested_tensor([value[0], value[1]]), 'float32, float16': value.long(),
           'infinite num': value.double() * 1e300}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        odd['q'] = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    path = f'{tmp_path}/x.pt'
    for words, tensor in odd.items():
        state = {**weights, key: tensor}
        torch.save(state, path)
        for source in (state, path):
            with exits_with(key, words):
                MDM.from_pretrained('maskbit', source)
    MDM.from_pretrained('maskbit', {**weights, key: torch.nn.Parameter(value)})
    net = small_model()
    for words in ('NaN', 'int8', 'bool', 'complex64', 'sparse', 'q'):
        state = {**net.state_dict(), 'pos_emb': odd[words]}
        with exits_with('f.pt: ema: pos_emb', words):
            restore(net, state, 'f.pt', 'ema')
    with exits_with('f.pt: ema', 'no dict'):
        restore(net, None, 'f.pt', 'ema')
    whole = torch.load(f'{tiny_run()[0]}/model.pt', weights_only=True)
    whole['tokenizer']['net']['codebook.weight'][0] = np.nan
    with exits_with('x.pt: its tokenizer: codebook.weight', 'NaN'):
        unpack(whole, path='x.pt')


def test_what_a_network_needs_must_be_there_and_the_rest_is_said():
    vqgan = mini_tokenizer('maskgit')
    weights = published(vqgan, 'maskgit')
    for extra in ('quantize.used', 'foreign.weight', 'step'):
        with capture() as text:
            again = Tokenizer.from_pretrained('maskgit', {**weights, extra: torch.ones(3)})
        assert f'1 tensors are not needed and left out, the first is {extra}' in text.getvalue()
        same(again.state_dict(), vqgan.state_dict())
    for extra in ('encoder.mid.attn_2.q.weight', 'decoder.conv_in.weight_scale'):
        with exits_with(extra, 'would compute something else'):
            Tokenizer.from_pretrained('maskgit', {**weights, extra: torch.ones(3)})
    hole = {**weights, 'decoder.up.1.block.0.conv1.weight': torch.zeros(32, 64, 3, 3)}
    with capture() as text:
        Tokenizer.from_pretrained('maskgit', hole)
    assert 'zeros in a row, the first is decoder.up.1.block.0.conv1.weight' in text.getvalue()


def test_a_learned_codebook_is_no_tokenizer_of_bits():
    weights = published(mini_tokenizer('maskbit'), 'maskbit')
    with exits_with('quantize.embedding.weight is a learned codebook', 'expected a maskbit tokenizer of bits'):
        Tokenizer.from_pretrained('maskbit', {**weights, 'quantize.embedding.weight': torch.randn(64, 6)})
    with exits_with('conv_out.weight has 256 rows', 'expected 2 to 32'):       # 2^128 codes
        Tokenizer.from_pretrained('maskbit', {**weights, 'encoder.conv_out.weight': torch.ones(256, 32, 1, 1)})


def test_words_of_a_file_are_printable_and_short_in_messages(tmp_path):
    weights = published(mini('maskbit'), 'maskbit')
    path = f'{tmp_path}/x.pt'
    for word in ('\x1b[31mred\nline', 'x' * 3_000_000, '\u202eback', 'a\rb'):
        with capture() as text:
            MDM.from_pretrained('maskbit', {**weights, word: torch.ones(1)})
            MDM.from_pretrained('maskbit', {word: weights, 'model_ema': dict(weights)})
        printed_lines = text.getvalue().splitlines()
        assert len(printed_lines) == 2 and max(map(len, printed_lines)) < 500
        assert all(line.isprintable() for line in printed_lines)
        torch.save(dict(stage=word), path)
        calls = [functools.partial(MDM.from_pretrained, 'maskbit', {word: torch.ones(1)}),
                 functools.partial(load_checkpoint, path, 'model'),
                 functools.partial(restore, small_model(), {word: torch.ones(1)}, 'f.pt', 'net')]
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert str(error).isprintable() and len(str(error)) < 1500
            else:
                raise AssertionError('no error')


def test_distillation_freezes_the_embedding_tables_of_both_layouts():
    tables = {'maskgit': {'tok_emb.weight', 'cond_emb.weight'},
              'maskbit': {'input_proj.weight', 'input_proj.bias', 'cond_emb.weight'}}
    for kind, names in tables.items():
        network = mini(kind)
        frozen = {id(p) for p in network.embedding_parameters()}
        assert {name for name, p in network.named_parameters() if id(p) in frozen} == names


# -----------------------------------------------------------------------------
# Teachers

def save_published(folder, kind, name='', sizes=None, codes=None):
    """The files of a small published teacher -> where its network and its tokenizer are."""
    net = f'{folder}/{name or kind}.pth'
    tok = f'{folder}/{name or kind}.ckpt'
    torch.save(published(mini(kind, **sizes or {}), kind), net)
    torch.save(published(mini_tokenizer(kind, **codes or {}), kind), tok)
    return net, tok


def test_a_published_teacher_is_asked_for_politely(tmp_path):
    with exits_with('--teacher_path=FILE', '--tokenizer_path=FILE'):
        load_teacher('maskgit', '')
    maskgit, vqgan = save_published(tmp_path, 'maskgit')
    maskbit, bits = save_published(tmp_path, 'maskbit')
    _, more_codes = save_published(tmp_path, 'maskgit', 'other', codes=dict(n_codes=64))
    _, more_bits = save_published(tmp_path, 'maskbit', 'five', codes=dict(code_dim=5, n_codes=32))
    with exits_with('maskbit.pth'):
        load_teacher('maskgit', maskbit, vqgan)
    with exits_with('none.ckpt: no such file'):
        load_teacher('maskgit', maskgit, f'{tmp_path}/none.ckpt')
    with exits_with('maskgit.pth', 'expected V + K + 2 with V = 64'):
        load_teacher('maskgit', maskgit, more_codes)
    with exits_with('of 32', 'not of one release'):
        load_teacher('maskbit', maskbit, more_bits)
    picture_folder(f'{tmp_path}/data')
    with exits_with('2 class folders', '10 classes'):
        load_teacher('maskgit', maskgit, vqgan, f'{tmp_path}/data')


def test_sizes_that_one_published_file_leaves_open_are_read_off_the_other(tmp_path):
    maskgit = save_published(tmp_path, 'maskgit', sizes=dict(V=48, n_words=10),
                             codes=dict(n_codes=48))
    maskbit = save_published(tmp_path, 'maskbit', sizes=dict(N=16, V=16, bits=4, S=1),
                             codes=dict(code_dim=4, S=1, n_codes=16))
    by_chance = save_published(tmp_path, 'maskgit', 'chance', dict(V=1024, n_words=10 + 94),
                               dict(n_codes=1024))         # V + K - 1000 is a power of two
    found = load_teacher('maskgit', *by_chance)
    assert (found.net.V, found.net.n_words) == (1024, 104)
    for kind, paths, V in (('maskgit', maskgit, 48), ('maskbit', maskbit, 16)):
        with capture() as text:
            found = load_teacher(kind, *paths, n_head=2)
        assert 'guess' not in text.getvalue()
        assert (found.net.V, found.net.config['n_head'], found.tokenizer.S) == (V, 2, 1)
        assert found.prompts == [str(k) for k in range(10)]
        assert found.encode(['3', '7']).tolist() == [[3], [7]]
        assert Tokenizer.from_checkpoint(found.pack()['tokenizer']).S == 1


def test_what_a_checkpoint_was_made_from_is_compared_part_by_part():
    made = dict(tokenizer='t', vocabulary='v', data='d', teacher='n')
    refused = {'tokenizer': 'tokens mean something else', 'vocabulary': 'word numbers mean something else'}
    said = {'data': 'other images', 'teacher': 'another teacher'}
    for part in made:
        now = dict(made, **{part: 'another'})
        if part in refused:
            with exits_with('x.pt', part, refused[part]):
                check_origin('x.pt', dict(origin=made), now)
        else:
            assert printed(check_origin, 'x.pt', dict(origin=made), now) == f'note: x.pt was made with {said[part]}\n'
        without = {other: made[other] for other in made if other != part}
        assert printed(check_origin, 'x.pt', dict(origin=made), without) == ''     # nothing to compare
    assert printed(check_origin, 'x.pt', dict(origin=made), dict(made)) == ''
    assert printed(check_origin, 'x.pt', dict(), made) == ''                       # of an earlier version


def test_a_teacher_knows_what_its_stages_are_made_from():
    other_net = small_model()
    other_net.bias.data += 1
    origins = []
    for net, words in ((small_model(), 'abcde'), (other_net, 'abcde'), (small_model(), 'abcdf')):
        ids = torch.zeros(1, 3, dtype=torch.long)
        teacher = word_teacher('ours', net, small_tokenizer(), list(words), ids, '', {}, 'cpu')
        origins.append(teacher.origin)
    first, with_other_net, with_other_words = origins
    assert first.keys() == {'tokenizer', 'vocabulary', 'teacher'}                  # nothing is known of its data
    assert with_other_net == dict(first, teacher=with_other_net['teacher']) != first
    assert with_other_words == dict(first, vocabulary=with_other_words['vocabulary']) != first


def test_published_tokenizers_are_told_apart_by_their_weights(tmp_path):
    path = f'{tmp_path}/tokenizer.bin'
    found = []
    for k in range(2):
        made = mini_tokenizer('maskbit')
        torch.nn.init.constant_(made.decoder.conv_out.weight, k)
        torch.save(published(made, 'maskbit'), path)       # the second replaces the first
        found.append(Tokenizer.from_pretrained('maskbit', path, made.grid))
    first, second = found
    assert first.digest() != second.digest()
    Tokenizer.from_checkpoint(second.pack())
    with exits_with('other weights', '--tokenizer_path'):
        Tokenizer.from_checkpoint(first.pack())
    packed = dict(second.pack())
    del packed['digest']
    with exits_with('without a digest'):
        Tokenizer.from_checkpoint(packed)


def save_stage(folder, script, step, **more):
    """A checkpoint of tokenizer.py or model.py as a run of 5 steps leaves it."""
    config = dict(steps=5, data='shapes', **more)
    path = f'{folder}/{script}.pt'
    save_checkpoint(path, dict(stage=script, step=step, config=config, net={}))
    return path


def test_a_missing_teacher_is_trained_first(tmp_path):
    def ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(subprocess, 'Popen') as launched, capture() as text:
        with exits_with('tokenizer.py did not finish'):    # as nothing is there afterwards
            train_missing('shapes', f'{tmp_path}', 7)
        command = [f'{HERE}/tokenizer.py', '--seed=7', f'--out_dir={tmp_path}']
        assert launched.call_args.args[0][1:] == command
        assert 'tokenizer.pt is missing' in text.getvalue() and '3 minutes' in text.getvalue()
        launched.return_value.wait.side_effect = ctrl_c
        with exits_with('did not finish'):                 # Ctrl-C: wait until the child has saved
            train_missing('shapes', f'{tmp_path}', 7)
        launched.return_value.terminate.assert_called_once()


def test_an_unfinished_teacher_is_trained_to_its_end(tmp_path):
    path = save_stage(tmp_path, 'tokenizer', 5)
    os.rename(path, f'{tmp_path}/tokenizer.prev.pt')       # killed between two renames
    save_stage(tmp_path, 'model', 4, D=32)
    with mock.patch.object(subprocess, 'Popen') as launched, capture() as text:
        with exits_with('model.py did not finish'):
            train_missing('shapes', tmp_path, 7)
        assert 'using the previous one' in text.getvalue()
        command = [f'{HERE}/model.py', '--steps=5', '--D=32', '--resume=True', f'--out_dir={tmp_path}']
        assert launched.call_args.args[0][1:] == command
        save_stage(tmp_path, 'tokenizer', 5)
        save_stage(tmp_path, 'model', 5)
        assert printed(train_missing, '', tmp_path, 7) == ''       # it holds its tokenizer
        assert launched.call_count == 1


def test_a_teacher_of_other_data_is_refused(tmp_path):
    save_stage(tmp_path, 'tokenizer', 5)
    with exits_with('was trained on shapes, not on other'):
        train_missing('other', tmp_path, 7)
    save_stage(tmp_path, 'model', 5)
    with exits_with('was trained on shapes, not on other'):
        train_missing('other', tmp_path, 7)


# -----------------------------------------------------------------------------
# Rewards

def small_world_tokenizer():
    """A tokenizer of random weights for the shapes world: 32 pixels <-> 64 tokens of 12 codes."""
    return Tokenizer(32, 8, '1,1,2', 1, 12, 4).eval()


def test_a_reward_asks_for_each_prompt_once_and_rises_on_one_step():
    score = rewards.world_reward(f'{tiny_run()[0]}/rewards.pt', 'clip', 'cpu')
    images = (torch.rand(3, 3, 32, 32) * 2 - 1).requires_grad_()
    prompts = [RED, 'a blue square', RED]
    with mock.patch.object(rewards, 'word_ids', wraps=rewards.word_ids) as asked:
        value = score(images, prompts)
        score(images, prompts)
    assert sorted(call.args[0][0] for call in asked.call_args_list) == ['a blue square', RED]
    assert value.shape == (3,) and (value <= 0).all()
    grad, = torch.autograd.grad(value.sum(), images)
    assert torch.isfinite(grad).all() and (grad.flatten(1).norm(dim=1) > 0).all()
    uphill = images.detach() + 1e-3 * grad / grad.std()
    assert (score(uphill, prompts) > value).all()


def reward_settings(**changes):
    """The settings of reward.py, every weight 0."""
    found = {}
    for name in setting_names(vars(reward)):
        found[name] = 0.0 if name.startswith('w_') else vars(reward)[name]
    found.update(changes)
    return found


def test_nothing_is_loaded_for_a_weight_of_zero():
    assert rewards.load_rewards(reward_settings(), 'no.pt', 'cpu') == {}
    with exits_with('no.pt', 'python reward.py'):
        rewards.load_rewards(reward_settings(w_clip=1.0), 'no.pt', 'cpu')
    with mock.patch.dict(sys.modules, transformers=None):
        with exits_with('pip install transformers'):
            rewards.load_rewards(reward_settings(w_pick=1.0), '', 'cpu')


def test_rewards_are_added_with_their_weights():
    def one(images, prompts):
        return torch.ones(len(images))

    world_file = f'{tiny_run()[0]}/rewards.pt'
    loaded = rewards.load_rewards(reward_settings(w_clip=2.0), world_file, 'cpu')
    assert list(loaded) == ['clip']
    weight, score = loaded['clip']
    assert weight == 2.0
    images = torch.zeros(1, 3, 32, 32)
    total = rewards.reward_sum({**loaded, 'one': (3.0, one)}, images, [RED])
    assert torch.allclose(total, 2 * score(images, [RED]) + 3)


def test_mixed_tokens_harm_by_their_weight():
    torch.manual_seed(0)
    ids = torch.randint(12, (64, 16))
    other = torch.randint(12, (64, 16))
    probs = rewards.mixed(ids, other, 12, rng())
    assert probs.shape == (64, 16, 12)
    assert torch.allclose(probs.sum(-1), torch.ones(64, 16))
    kept = (probs.gather(-1, ids[..., None]) > 0.999).float().mean()
    assert 0.4 < kept < 0.95                               # elsewhere than in the boxes
    white = torch.ones(1, 3, 32, 32)
    assert rewards.damage(white, torch.zeros_like(white)) == 1


def test_reward_models_learn_that_broken_images_show_nothing():
    source = open_data('shapes', 32, 64)
    images, captions = source.batch(range(64))
    ids = word_ids(captions, world.WORDS, 8)
    vq = small_world_tokenizer()
    training = dict(seed=0, reward_steps=15, reward_batch=16, reward_lr=5e-3, n_wrong=1)
    scores = {}
    for harm in (0.0, 1.0):
        def damage(x, y):
            return torch.full((len(x),), harm)

        with mock.patch.object(rewards, 'damage', damage):
            net = rewards.train_reward('conv', source, vq, list(world.WORDS), 8, 0, CPU, training)
        log_odds = net.score(net.image_features(images), net.text_features(ids))
        scores[harm] = log_odds.mean()
    assert scores[0.0] > -0.8 and scores[1.0] < -5         # log-odds of true captions


# Published ones

def clip_cosine(network, images, ids):
    """What the formulas below share, by the library's own functions."""
    f = network.get_image_features(pixel_values=rewards.pixels_224(images))
    g = network.get_text_features(input_ids=ids)
    f = getattr(f, 'pooler_output', f)                     # from version 5 on
    g = getattr(g, 'pooler_output', g)
    return F.cosine_similarity(f, g)


def two_images():
    return (torch.rand(2, 3, 40, 40) * 2 - 1).requires_grad_()


def has_gradient(score, images):
    grad, = torch.autograd.grad(score.sum(), images)
    return torch.isfinite(grad).all() and grad.abs().max() > 0


def test_preprocessing_equals_pils_to_a_hundredth():
    for height, width in ((256, 256), (300, 420), (512, 512), (32, 32)):
        y, x = np.mgrid[:height, :width] / 20
        waves = [np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x / 3) * np.sin(y)]
        pixels = (np.stack(waves, -1) * 120 + 128).astype(np.uint8)
        wide = 224 * width // min(height, width)           # torchvision's Resize
        high = 224 * height // min(height, width)
        left = (wide - 224) // 2
        top = (high - 224) // 2
        resized = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC)
        expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        ours = rewards.pixels_224(images)[0].permute(1, 2, 0).numpy()
        ours = ours * rewards.CLIP_STD + rewards.CLIP_MEAN
        assert ours.shape == (224, 224, 3)
        assert abs(ours - expected).max() < 0.01
    x = (torch.rand(1, 3, 40, 50) * 2 - 1).requires_grad_()
    grad, = torch.autograd.grad(rewards.pixels_224(x).square().sum(), x)
    assert (grad != 0).any(1).float().mean() > 0.7         # not what the centre crop cuts off


def test_clip_score_and_pickscore_follow_their_formulas(tmp_path):
    images = two_images()
    network, ids = tiny_clip(tmp_path)
    cosine = clip_cosine(network, images, ids)
    for kind, scale in (('clipscore', 100), ('pick', network.logit_scale.exp())):
        judge = rewards.clip_reward(kind, tmp_path, tmp_path, 'cpu')
        score = judge(images, [RED, 'a circle'])
        assert torch.allclose(score, scale * cosine, atol=1e-4)
        assert has_gradient(score, images)
    with exits_with('cannot load', 'nowhere'):
        rewards.clip_reward('pick', f'{tmp_path}/nowhere', tmp_path, 'cpu')
    half = {k: v for k, v in network.state_dict().items() if 'layers.1.mlp' not in k}
    network.save_pretrained(f'{tmp_path}/half', state_dict=half)
    with exits_with('half: it has no', 'layers.1.mlp'):
        rewards.clip_reward('pick', f'{tmp_path}/half', tmp_path, 'cpu')


def test_a_reward_that_cannot_read_its_prompts_is_refused(tmp_path):
    transformers = transformers_or_skip()
    network, _ = tiny_clip(tmp_path)
    network.save_pretrained(f'{tmp_path}/wordless')
    torch.save(to_open_clip(network.state_dict()), f'{tmp_path}/hps.pt')
    torch.save(imagereward_state(transformers)[0], f'{tmp_path}/ImageReward.pt')
    paths = {'clipscore': f'{tmp_path}/wordless', 'pick': tmp_path, 'hps': f'{tmp_path}/hps.pt'}
    for kind, path in paths.items():
        with exits_with(f'{tmp_path}/wordless', 'knows 0 of 10 common words'):
            rewards.clip_reward(kind, path, f'{tmp_path}/wordless', 'cpu')
    with exits_with(f'{tmp_path}/wordless', 'knows 0 of 10 common words'):
        rewards.image_reward(f'{tmp_path}/ImageReward.pt', f'{tmp_path}/wordless', 'cpu')

    def few_words(prompts, **options):                     # as an invented tokenizer reads
        ids = torch.tensor([[1, *[0] * 10, 2]] * len(prompts))
        return dict(input_ids=ids, attention_mask=ids)
    with exits_with('x: ', 'knows 0 of 10 common words'):
        rewards.word_reader(few_words, 12, 10, 'x')
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with exits_with('x: ', 'gives the id 9', 'has 9'):
        rewards.word_reader(words, 12, 9, 'x')
    read = rewards.word_reader(words, 12, 10, 'x')
    note = printed(read, ['red ' * 30, 'green ' * 30])
    assert note.startswith('note: a prompt has 32 pieces, the reward x reads 12'), note
    assert note.count('note') == 1
    assert printed(read, ['red ' * 30]) == ''
    network.config.text_config.eos_token_id = 77           # which ends no prompt
    network.save_pretrained(f'{tmp_path}/endless')
    with exits_with('says the same of two prompts', 'endless'):
        rewards.clip_reward('pick', f'{tmp_path}/endless', tmp_path, 'cpu')
    network.config.text_config.eos_token_id = 2
    network.logit_scale.data *= np.nan
    network.save_pretrained(f'{tmp_path}/nan')
    with exits_with('nan: logit_scale holds NaN'):
        rewards.clip_reward('pick', f'{tmp_path}/nan', tmp_path, 'cpu')


# Our own list of names, so that a mistake in the code's is seen
TO_OPEN_CLIP = (
    ('vision_model.', 'visual.'), ('text_model.', ''), ('encoder.layers', 'transformer.resblocks'),
    ('embeddings.', ''), ('patch_embedding', 'conv1'), ('pre_layrnorm', 'ln_pre'),
    ('position_embedding.weight', 'positional_embedding'), ('post_layernorm', 'ln_post'),
    ('final_layer_norm', 'ln_final'), ('layer_norm', 'ln_'), ('fc1', 'c_fc'), ('fc2', 'c_proj'),
    ('self_attn', 'attn'), ('q_proj.', 'in_proj_'), ('visual_projection.weight', 'visual.proj'),
    ('text_projection.weight', 'text_projection'))


def replace_all(text, pairs):
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def to_open_clip(state):
    """A CLIPModel's weights by open_clip's names; queries, keys and values are one matrix there."""
    found = {}
    for key, value in state.items():
        if 'k_proj' in key or 'v_proj' in key:
            continue
        if 'q_proj' in key:
            parts = [state[key.replace('q_proj', f'{letter}_proj')] for letter in 'qkv']
            value = torch.cat(parts)
        name = replace_all(key, TO_OPEN_CLIP)
        if name in ('visual.proj', 'text_projection'):
            value = value.T
        found[name] = value
    return found


def test_hps_is_read_from_open_clip_names(tmp_path):
    images = two_images()
    network, ids = tiny_clip(tmp_path)
    state = network.state_dict()
    names = to_open_clip(state)
    again = rewards.from_open_clip(names)
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value), key
    path = f'{tmp_path}/hps.pt'
    torch.save(dict(state_dict={**names, 'attn_mask': torch.ones(2)}), path)
    score = rewards.clip_reward('hps', path, tmp_path, 'cpu')(images, [RED, 'a circle'])
    assert torch.allclose(score, clip_cosine(network, images, ids), atol=1e-5)
    with exits_with('no.pt: no such file', '--hps_path'):
        rewards.clip_reward('hps', f'{tmp_path}/no.pt', tmp_path, 'cpu')
    torch.save({'blip.a': torch.ones(1)}, f'{tmp_path}/other.pt')
    with exits_with("other.pt: it has no 'visual.proj'"):
        rewards.clip_reward('hps', f'{tmp_path}/other.pt', tmp_path, 'cpu')
    with exits_with("hps.pt: it has no 'visual.post_layernorm"):
        rewards.image_reward(path, '', 'cpu')


TO_BLIP = (
    ('embeddings.class_embedding', 'cls_token'), ('embeddings.position_embedding', 'pos_embed'),
    ('embeddings.patch_embedding', 'patch_embed.proj'), ('encoder.layers', 'blocks'),
    ('self_attn.projection', 'attn.proj'), ('self_attn', 'attn'), ('layer_norm', 'norm'),
    ('post_layernorm', 'norm'))


def tiny_blip(transformers):
    """The three parts of ImageReward at a small size: BERT, vision transformer, linear layers."""
    text = transformers.BlipTextModel(transformers.BlipTextConfig(
        vocab_size=10, hidden_size=24, encoder_hidden_size=32, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=12, max_position_embeddings=35,
        layer_norm_eps=1e-12), add_pooling_layer=False)
    eyes = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, image_size=224,
        num_attention_heads=16, patch_size=112, layer_norm_eps=1e-6))
    widths = (24, 10, 9, 8, 7, 1)
    layers = {}
    for number, inputs, outputs in zip('02467', widths, widths[1:]):
        layers[number] = torch.nn.Linear(inputs, outputs)
    return text.eval(), eyes.eval(), layers


def imagereward_state(transformers):
    """The file of a small ImageReward, and its three parts."""
    text, eyes, layers = tiny_blip(transformers)
    state = {'blip.vision_proj.weight': torch.ones(1)}     # unused
    for number, layer in layers.items():
        state[f'mlp.layers.{number}.weight'] = layer.weight.detach()
        state[f'mlp.layers.{number}.bias'] = layer.bias.detach()
    for key, value in text.state_dict().items():
        state[f'blip.text_encoder.{key}'] = value
    for key, value in eyes.state_dict().items():
        state[f'blip.visual_encoder.{replace_all(key, TO_BLIP)}'] = value
    return state, text, eyes, layers


def test_imagereward_reads_its_published_names(tmp_path):
    images = two_images()
    _, ids = tiny_clip(tmp_path)                           # only its word tokenizer is used
    state, text, eyes, layers = imagereward_state(transformers_or_skip())
    path = f'{tmp_path}/ImageReward.pt'
    torch.save(state, path)
    score = rewards.image_reward(path, tmp_path, 'cpu')(images, [RED, 'a circle'])

    ids = F.pad(ids, (0, 23))                              # to the 35 that it reads
    seen = eyes(pixel_values=rewards.pixels_224(images)).last_hidden_state
    read = text(ids, attention_mask=(ids > 0).long(), encoder_hidden_states=seen, is_decoder=False)
    h = read[0][:, 0]
    for layer in layers.values():
        h = layer(h)
    expected = (h[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert torch.allclose(score, expected, atol=1e-4)
    assert has_gradient(score, images)


# -----------------------------------------------------------------------------
# Our files

def test_bad_checkpoints_are_explained_and_the_one_before_a_broken_one_is_used(tmp_path):
    path = f'{tmp_path}/x.pt'
    with exits_with(path, 'no such checkpoint', 'Train it.'):
        load_checkpoint(path, 'distill', 'Train it.')
    for step in (1, 2):
        save_checkpoint(path, dict(stage='distill', step=step, net=dict(w=torch.ones(1000))))
    whole = open(path, 'rb').read()
    problems = {whole[:len(whole) // 2]: 'truncated or not a checkpoint',
                b'': 'truncated or not a checkpoint', b'hello': ''}
    for broken, words in problems.items():
        open(path, 'wb').write(broken)
        with exits_with(path, words, 'Train it.'):
            load_checkpoint(path, 'distill', 'Train it.')
        with capture() as text:
            state = load_checkpoint(path, 'distill', 'Train it.', fallback=True)
        assert state['step'] == 1 and words in text.getvalue()
        assert f'using the previous one, {tmp_path}/x.prev.pt' in text.getvalue()
    open(f'{path}.123.prev.tmp', 'w').close()              # of a run that was killed
    save_checkpoint(path, dict(stage='distill', step=3))
    assert load_checkpoint(path, 'distill')['step'] == 3
    assert load_checkpoint(f'{tmp_path}/x.prev.pt')['step'] == 1       # broken: not kept
    assert sorted(os.listdir(tmp_path)) == ['x.prev.pt', 'x.pt']


def test_files_that_are_no_checkpoint_of_the_stage_asked_for_are_explained(tmp_path):
    path = f'{tmp_path}/x.pt'
    save_checkpoint(path, dict(stage='model', step=1))
    save_checkpoint(path, dict(stage='model', step=2))     # nothing stands in for a whole file
    problems = {'not a checkpoint of this project': dict(weights=torch.ones(3)),
                "its entry 'config' is no dict": dict(stage='model', config=3),
                'is a tokenizer checkpoint, expected model or distill': dict(stage='tokenizer')}
    for words, foreign in problems.items():
        torch.save(foreign, path)
        with exits_with(path, words, 'Train it.'):
            load_checkpoint(path, 'model|distill', 'Train it.', fallback=True)
    weights = small_model(D=12).state_dict()
    with exits_with('f.pt: net does not fit', 'tok_emb.weight', 'size mismatch'):
        restore(small_model(), weights, 'f.pt', 'net')


def test_an_entry_that_a_checkpoint_lacks_is_one_line_that_names_it(tmp_path):
    path = f'{tmp_path}/x.pt'
    for script in SCRIPTS:
        state = torch.load(f'{tiny_run()[0]}/{script[:-3]}.pt', weights_only=True)
        for key in state.keys() - {'stage'}:
            torch.save({name: value for name, value in state.items() if name != key}, path)
            with exits_with(f'{path}: has no entry {key!r}', 'edited'):
                load_checkpoint(path)[key]
    del state['config']['data'], state['args']['D']
    state['tokenizer'].pop('net')
    torch.save(state, path)
    edited = load_checkpoint(path)
    with exits_with(f"{path}: config: has no entry 'data'"):
        edited['config']['data']
    with exits_with(f'{path}: its "args" make no MDM', "'D'"):
        unpack(edited, path=path)
    edited['args'] = dict(edited['args'], D=32)
    with exits_with(f"{path}: tokenizer: has no entry 'net'"):
        unpack(edited, path=path)
    must_refuse('sample.py', f'--ckpt={path}', words='"args" make no MDM')
    torch.save(edited, f'{tmp_path}/again.pt')             # as plain containers
    assert load_checkpoint(f'{tmp_path}/again.pt')['step'] == state['step']


def test_a_checkpoint_hands_on_the_settings_asked_for(tmp_path):
    path = f'{tmp_path}/x.pt'
    keys = ('tau', 'beta', 'no_such')
    assert settings_of(path, keys) == {}                   # loading it will say so
    save_checkpoint(path, dict(stage='distill', step=1, config=dict(tau=0.5, beta=0.1, seed=7)))
    assert settings_of(path, keys) == dict(tau=0.5, beta=0.1)
    save_checkpoint(path, dict(stage='distill', step=2, config=dict(tau=0.6)))
    open(path, 'w').write('broken')
    assert settings_of(path, keys) == dict(tau=0.5, beta=0.1)          # of the one before


def test_resume_without_a_file_starts_with_a_note(tmp_path):
    path = f'{tmp_path}/x.pt'
    text = printed(resumes, True, path)
    assert text.startswith(f'note: {path} is not there yet') and printed(resumes, False, path) == ''
    save_checkpoint(path, dict(stage='distill', step=1))
    assert resumes(True, path) and not resumes(False, path)


def test_resuming_with_other_settings_is_said(tmp_path):
    path = f'{tmp_path}/x.pt'
    config = dict(beta=0.1, seed=0, resume=False, out_dir='out')
    save_checkpoint(path, dict(stage='distill', step=1, config=config))
    same_run = {**config, 'resume': True, 'out_dir': 'elsewhere'}
    assert printed(load_resumed, path, 'distill', same_run) == ''
    text = printed(load_resumed, path, 'distill', {**config, 'beta': 0.2})
    assert text == f'note: {path} continues with --beta=0.2 (it had 0.1)\n'


def test_resuming_with_another_tokenizer_is_refused(tmp_path):
    for script in ('distill', 'gan', 'reward'):
        folder = ready_for(f'{script}.py', f'{tmp_path}/{script}')
        state = torch.load(f'{tiny_run()[0]}/{script}.pt', weights_only=True)
        weights = state['tokenizer']['net']
        state['tokenizer']['net'] = {key: value + 1 for key, value in weights.items()}
        torch.save(state, f'{folder}/{script}.pt')
        must_refuse(f'{script}.py', f'--out_dir={folder}', '--resume', words='a tokenizer other than')


class Bomb:
    """Calls a function when it is unpickled."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_code_in_a_file_is_never_executed(tmp_path):
    path = f'{tmp_path}/bomb.pt'
    trace = f'{tmp_path}/executed'
    bombs = {os.system: f'mkdir {trace}', os.mkdir: trace, subprocess.getoutput: f'mkdir {trace}',
             eval: f'__import__("os").mkdir("{trace}")'}
    for function, argument in bombs.items():
        state = dict(stage='distill', w=torch.ones(1), bomb=Bomb(function, argument))
        torch.save(state, path)
        with exits_with('refused', 'nothing in it was executed'):
            load_checkpoint(path)
        with contextlib.suppress(ValueError):              # refused, or read as an empty dict
            Tokenizer.from_pretrained('maskgit', path)
        assert not os.path.exists(trace)
        torch.load(path, weights_only=False)
        os.rmdir(trace)                                    # it was a real one


def test_no_space_loses_no_checkpoint(tmp_path):
    path = f'{tmp_path}/x.pt'
    save_checkpoint(path, dict(stage='distill', step=1))
    script = f'{tmp_path}/save.py'
    lines = ['import sys, torch', 'from common.files import save_checkpoint',
             'from common.run import report_error', 'sys.excepthook = report_error',
             f'save_checkpoint({path!r}, dict(net=dict(w=torch.ones(9999))))']
    open(script, 'w').write('\n'.join(lines))
    must_refuse(script, before=FULL, words=f'save.py: cannot write {path}')
    assert load_checkpoint(path)['step'] == 1
    assert sorted(os.listdir(tmp_path)) == ['save.py', 'x.pt']


def test_no_space_or_permission_is_one_line(tmp_path):
    for script in SCRIPTS:
        folder = ready_for(script, f'{tmp_path}/{script}')
        must_refuse(script, f'--out_dir={folder}', before=FULL, words=f'cannot write {folder}')
    picture = f'{tmp_path}/grid.png'
    ask = ['--ckpt', f'{tiny_run()[0]}/distill.pt', f'--grid={picture}']
    must_refuse('sample.py', *ask, before=FULL, words=f'cannot write {picture}')
    path = f'{tmp_path}/file'
    open(path, 'w').close()                                # chmod would not stop root
    for script in SCRIPTS:                                 # at once: a line on the processes, and this
        ask = f'{script} --out_dir={path}/out'
        if script in ('gan.py', 'reward.py'):
            ask += f' --init={tiny_run()[0]}/distill.pt'
        code, text = run(ask)
        assert code == 1 and text.count('\n') == 2, text
        assert f'cannot write {path}/out' in text and 'choose another --out_dir' in text
    for script, wanted in {distill: '--out_dir', sample: '--grid or --png_dir', tteo: '--name'}.items():
        configure(dict(vars(script)), argv=[])
        with exits_with('cannot write', f'choose another {wanted}'):
            save_checkpoint(f'{path}/y.pt', {})


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    rates = {'tokenizer': 'lr', 'model': 'lr', 'distill': 'generator_lr', 'gan': 'generator_lr',
             'reward': 'generator_lr'}
    for script, name in rates.items():
        folder = ready_for(f'{script}.py', f'{tmp_path}/{script}')
        must_refuse(f'{script}.py', f'--out_dir={folder}', f'--{name}=1e38', '--log_every=100',
                    words='is not finite')
        assert not os.path.exists(f'{folder}/{script}.pt')
    broken = dict(step=3, net=dict(w=torch.tensor([1.0, float('nan')])))
    with exits_with('not finite at step 3'):
        save_checkpoint(f'{tmp_path}/x.pt', broken)
    assert not os.path.exists(f'{tmp_path}/x.pt')


def test_a_damaged_line_of_a_log_is_dropped_and_the_others_kept(tmp_path):
    good = ['{"step": 2, "loss": 1.0}\n', '{"step": 4, "loss": 2.0}\n']
    for damage in ('\n', '\0\0\0\n', '\0' * 9, '{"step": {}}\n', '{"step": null}\n', '{"step": "3"}\n', '[]\n',
                   '3\n', '[' * 99999 + '\n', '{"step": NaN}\n', '{"step": 4', '\ufffd\n', '{"step": 5}\n'):
        path = tmp_path / 'x.log.jsonl'
        path.write_text(good[0] + damage.rstrip('\n') + '\n' + good[1] + damage, encoding='utf-8')
        Log(f'{tmp_path}/x.pt', 4)
        assert path.read_text() == ''.join(good), damage[:20]
    Log(f'{tmp_path}/x.pt', 0)
    assert os.listdir(tmp_path) == ['x.log.jsonl'] and path.read_text() == ''


def test_a_run_that_starts_anew_leaves_nothing_that_resume_would_take_for_its_own(tmp_path):
    (tmp_path / 'x.prev.pt').write_text('older')
    (tmp_path / 'x.pt').write_text('old')
    with capture() as said:
        Log(f'{tmp_path}/x.pt', 0)
    assert not resumes(True, f'{tmp_path}/x.pt')
    assert (tmp_path / 'x.old.pt').read_text() == 'old' and 'is now' in said.getvalue()
    (tmp_path / 'x.pt').write_text('new')
    Log(f'{tmp_path}/x.pt', 4)
    assert resumes(True, f'{tmp_path}/x.pt')


# -----------------------------------------------------------------------------
# Where a run is started

def test_launcher_variables_are_whole_and_possible_or_one_line():
    def said(rank, world, local, host, port):
        return dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=local, MASTER_ADDR=host, MASTER_PORT=port)

    good = {(0, 1, 0): [{}, dict(RANK=''), said('0', '1', '0', 'localhost', '29500')],
            (9, 16, 1): [said('9', '16', '1', 'node-1', '29500')]}
    bad = [dict(RANK='1'), dict(WORLD_SIZE='2'), dict(MASTER_ADDR='node-1'), dict(RANK='0', WORLD_SIZE='1'),
           said('5', '2', '0', 'h', '1'), said('0', 'abc', '0', 'h', '1'), said('-1', '2', '0', 'h', '1'),
           said('0', '0', '0', 'h', '1'), said('0', '2', '2', 'h', '1'), said('0', '2', '', 'h', '1'),
           said('0', '2', '0', 'h', 'x'), said('0', '2', '0', 'h', '65536'), said('0.0', '1', '0', 'h', '1')]
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    for numbers, environments in good.items():
        for variables in environments:
            with mock.patch.dict(os.environ, clean | variables, clear=True):
                assert launched() == numbers
    for variables in bad:
        with mock.patch.dict(os.environ, clean | variables, clear=True):
            named = ' '.join(key for key, value in variables.items() if value)
            with exits_with(f'{list(variables)[0]}=', 'torchrun', f'unset {named}'):
                launched()
    rank_alone = "import os\nos.environ['RANK'] = '1'"
    for script in (*SCRIPTS, 'sample.py', 'tteo.py'):
        must_refuse(script, before=rank_alone, words=f'{script}: the environment says RANK=1, expected all of')


def test_a_link_to_a_script_and_python_without_docstrings_do_as_the_script(tmp_path):
    os.symlink(f'{HERE}/gan.py', tmp_path / 'link.py')
    init = f'--init={tiny_run()[0]}/distill.pt'
    must_refuse(f'{tmp_path}/link.py', '--w_gan=0', '--w_dimo=0', init, f'--out_dir={tmp_path}',
                words='link.py: --w_gan=0 and --w_dimo=0 leave nothing to learn')
    command = [sys.executable, '-OO', tmp_path / 'link.py', '--help']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == must_run('gan.py --help'), done.stderr


# -----------------------------------------------------------------------------
# Ends of a run

def test_output_that_cannot_be_printed_is_dropped_or_escaped(tmp_path):
    def closed_pipe():
        reading, end = os.pipe()
        os.close(reading)
        return end

    def full_pipe():
        _, end = os.pipe()
        os.set_blocking(end, False)                            # as Node.js and others leave it
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(end, bytes(4096))
        return end

    def dead_terminal():
        master, end = os.openpty()
        os.close(master)
        return end

    def full_disk():
        return os.open('/dev/full', os.O_WRONLY)

    for end in (closed_pipe, full_pipe, dead_terminal, full_disk):
        first = open(end(), 'w', encoding='utf-8')
        stream = console(first)
        for line in ('a', 'b' * 99999):
            print(line, file=stream, flush=True)
        stream.close()
    for encoding, wanted in {'ascii': '\\u732b \\xe4\n', 'cp1252': '\\u732b \u00e4\n', 'utf-8': '\u732b \u00e4\n'}.items():
        path = tmp_path / encoding
        first = open(path, 'w', encoding=encoding)
        stream = console(first)
        print('\u732b \u00e4', file=stream)
        assert path.read_text(encoding=encoding) == wanted     # at once, line by line
    print('x', file=console(None))                             # closed from the start
    notebook = io.StringIO()
    assert console(notebook) is notebook


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    folder = ready_for('model.py', tmp_path)
    command = f'"{sys.executable}" "{HERE}/model.py" --D=16 --depth=1 --n_head=2 --steps=2 --batch_size=8 --n_images=32'
    for where in ('2>&1 | head -1', '>&- 2>&-'):
        done = subprocess.run(f'{command} --out_dir="{folder}" {where}', shell=True, capture_output=True, text=True)
        assert done.stderr == '' and done.stdout.count('\n') <= 1
        assert load_checkpoint(f'{folder}/model.pt')['step'] == 2
        os.remove(f'{folder}/model.pt')


def test_every_signal_that_asks_for_a_stop_is_heard_but_a_closed_terminal_under_nohup():
    before = {}
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGXCPU'):
        number = getattr(signal, name)
        before[number] = signal.signal(number, signal.SIG_DFL)     # the tests may run under nohup
        stop = Stop()
        os.kill(os.getpid(), number)
        assert stop.now(0, CPU), name
    signal.signal(signal.SIGHUP, signal.SIG_IGN)               # nohup
    stop = Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.now(0, CPU)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_after_the_loop_a_signal_ends_at_once_unless_one_was_heard():
    before = signal.getsignal(signal.SIGINT)
    stop = Stop()
    assert signal.getsignal(signal.SIGINT) == stop.ask
    stop.over()
    assert signal.getsignal(signal.SIGINT) == before
    stop = Stop()
    os.kill(os.getpid(), signal.SIGINT)
    stop.over()                                        # torchrun may pass it on once more
    assert signal.getsignal(signal.SIGINT) == stop.ask
    for number, handler in stop.before.items():
        signal.signal(number, handler)


def report(error):
    """What a script prints at its end because of an error."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        report_error(type(error), error, error.__traceback__)
    return told.getvalue()


def test_ctrl_c_ends_with_one_line():
    assert report(KeyboardInterrupt()) == 'stopped\n'


def test_errors_raised_on_purpose_are_one_line_and_mistakes_of_ours_a_traceback(tmp_path):
    def error_of(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            return error

    on_purpose = error_of(load_checkpoint, f'{tmp_path}/x.pt')
    assert report(on_purpose).count('\n') == 1 and 'no such checkpoint' in report(on_purpose)
    for mistake in (error_of(int, 'x'), error_of(torch.ones(2).view, 3), error_of(open, tmp_path)):
        assert 'Traceback' in report(mistake)


def test_a_second_wish_to_stop_counts_after_a_second():
    with mock.patch.object(signal, 'signal'):
        stop = Stop()
    assert not stop.now(0, CPU)
    stop.ask(signal.SIGINT, None)
    stop.ask(signal.SIGTERM, None)
    assert stop.now(0, CPU)
    stop.asked -= 2
    stop.ask(signal.SIGHUP, None)                              # a terminal is no impatient person
    try:
        stop.ask(signal.SIGINT, None)
    except KeyboardInterrupt:
        return
    raise AssertionError('went on')


def test_bench_times_what_compilation_would_see():
    from torch.utils._python_dispatch import _get_current_dispatch_mode
    counted = []                                           # a FLOP counter around the call?

    def step():
        counted.append(_get_current_dispatch_mode() is not None)

    this_run = SimpleNamespace(device=CPU, autocast=contextlib.nullcontext())
    text = printed(report_bench, step, 1, this_run)
    assert counted == [False] * 23 + [True]
    assert 'ms_per_step' in text and 'images_per_s' in text
