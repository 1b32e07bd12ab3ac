"""
Text to image: MaskGen, Meissonic and their tokenizers against golden files, published files, samplers; the text encoder
and files of prompts; then miniatures of both teachers through every stage. test_all.py runs these too.
"""
import contextlib
import csv
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import distill
import model as M
from common import maskgen, meissonic
from common.benchmarks import read_jobs
from common.maskgen import MaskGen, TATiTok
from common.meissonic import Meissonic
from common.run import make_optimizers
from common.teachers import copy_of, load_teacher, unpack_tokenizer
from common.testing import (HERE, KILL, capture, exits_with, golden, made_once, mini_maskgen, mini_meissonic,
                            mini_tatitok, mini_vq, must_refuse, must_run, near, printed, published_text, rng, run, same,
                            save_safetensors, save_tower, save_words, shake, shard, tiny_clip,
                            transformers_or_skip)
from common.text import (PromptFile, TextEncoder, check_reads_text, load_text_encoder, load_tower, load_words,
                         prompt_source, read_prompts, same_prompts)
from model import MDM
from tokenizer import Tokenizer


# -----------------------------------------------------------------------------
# Conditions and ids of the miniatures

def one_hot(ids, V, dtype=torch.float32):
    return F.one_hot(ids, V).to(dtype)


def condition(net, B=2, seed=0):
    """A random condition of a network: words, pooled, micro (and MaskGen's guide)."""
    numbers = rng(seed)
    words = torch.randn(B, *net.null_words.shape[1:], generator=numbers)
    pooled = torch.randn(B, *net.null_pooled.shape[1:], generator=numbers)
    if net.law == 'maskgen':
        return words, pooled, torch.full((B, 1), 6.5), torch.randn(words.shape, generator=numbers)
    return words, pooled, torch.tensor([[64.0, 64, 0, 0, 6, 0]]).repeat(B, 1)


def random_ids(net, B=2, seed=0, mask=False):
    return torch.randint(net.V + mask, (B, net.N), generator=rng(seed))


NETWORKS = {'maskgen': mini_maskgen, 'meissonic': mini_meissonic}


# -----------------------------------------------------------------------------
# Golden files

def golden_maskgen():
    file = golden('maskgen_vq')
    net = MDM.from_pretrained('maskgen', file['state_dict'], n_head=3)
    x = file['inputs']
    return net, x, file['outputs'], (x['condition'], x['condition_pooled'][:, 0], x['aesthetic_score'][:, None])


def golden_meissonic():
    file = golden('meissonic_transformer')
    net = MDM.from_pretrained('meissonic', file['state_dict'], n_head=2, grid=8, axes=(4, 6, 6))
    return net, file['inputs'], file['outputs']


def meissonic_condition(x, timestep):
    timestep = torch.as_tensor(timestep).float().expand(2)[:, None]
    micro = torch.cat([x['micro_conds'].float(), timestep], 1)
    return x['encoder_hidden_states'], x['pooled_projections'], micro


def as_ids(x, mask_id, V):
    """(B, 8, 8) with the published mask id -> (B, 64) with ours."""
    ids = x.flatten(1)
    return ids.masked_fill(ids == mask_id, V)


def channels_first(logits, side=8):
    return logits.transpose(1, 2).unflatten(2, (side, side))


@torch.no_grad()
def test_maskgen_equals_the_golden_logits():
    net, x, y, cond = golden_maskgen()
    assert net.config == dict(N=16, V=32, D=48, depth=3, n_head=3, T=77, C=24, micro=32)
    near(maskgen.sinusoid(100 * x['aesthetic_score'], 32, 1000), y['aesthetic_embedding'])
    near(net(x['ids'], cond), y['logits'])
    hard = x['ids'].masked_fill(x['mask'], 7)
    near(net(net.embed(one_hot(hard, 32), x['mask']), cond), y['logits'])


@torch.no_grad()
def test_meissonic_equals_the_golden_logits_at_every_timestep():
    net, x, y = golden_meissonic()
    assert net.config == dict(V=32, D=32, n_joint=2, n_single=2, n_head=2, grid=8, T=77, C=24, axes=(4, 6, 6), pool=2)
    ids = as_ids(x['input_ids'], 39, 32)
    for name, tolerance in (('t0', 1e-4), ('t37', 1e-4), ('per_sample', 4e-3)):
        cond = meissonic_condition(x, x[f'timestep_{name}'])       # of 500.5 and 1000: angles of 1e6, in which the
        near(channels_first(net(ids, cond)), y[f'logits_{name}'], tolerance)       # last bit of an exp shows


@torch.no_grad()
def test_tatitok_equals_the_golden_codes_and_images():
    file = golden('tatitok')
    x = file['inputs']
    y = file['outputs']
    tokenizer = Tokenizer.from_pretrained('maskgen', file['state_dict'], n_head=(2, 3))
    assert tokenizer.config['width'] == (32, 48)
    assert tokenizer.config['depth'] == (2, 3)
    images = x['image'] * 2 - 1
    near(tokenizer.latents(images), y['encoder_out'][:, :, 0].transpose(1, 2))
    assert torch.equal(tokenizer.encode(images), y['indices'][:, 0])
    near(tokenizer.decode(x['indices'], x['text_guidance']) / 2 + 0.5, y['image_from_indices'])
    near(tokenizer.decode(y['indices'][:, 0], x['text_guidance']) / 2 + 0.5, y['reconstruction'])


@torch.no_grad()
def test_meissonic_vq_equals_the_golden_codes_and_images():
    file = golden('meissonic_vq')
    x = file['inputs']
    y = file['outputs']
    tokenizer = Tokenizer.from_pretrained('meissonic', file['state_dict'], grid=4)
    assert (tokenizer.N, tokenizer.V, tokenizer.config['image_size']) == (16, 16, 16)
    images = x['image'] * 2 - 1
    near(tokenizer.latents(images), y['encoder_out'].flatten(2).transpose(1, 2))
    assert torch.equal(tokenizer.encode(images), y['indices'].flatten(1))
    near(tokenizer.decode(x['code'].flatten(1)) / 2 + 0.5, y['image_from_code'])


class Replay:
    """A recorded stream in the place of a generator: numbers in order, choices by torch.multinomial."""

    def __init__(self, stream=(), rng=None):
        self.stream = iter(stream)
        self.rng = rng

    def numbers(self, shape, normal=False):
        if self.rng is not None:
            return torch.zeros(shape).uniform_(0, 1, generator=self.rng)
        found = next(self.stream)
        assert found.shape == tuple(shape)
        return found

    def choose(self, probs):
        ids = torch.multinomial(probs.flatten(0, 1), 1, generator=self.rng)
        return ids.view(probs.shape[:2])


def test_maskgen_sampler_draws_the_published_ids():
    net, x, _, cond = golden_maskgen()
    file = golden('e2e_maskgen')
    net.null_words.copy_(file['null_words'])
    net.null_pooled.copy_(file['null_pooled'][0])
    cond = (*cond[:2], torch.full((2, 1), 6.5))
    assert set(file['runs']) == {4, 8, 16}
    for steps, run in file['runs'].items():
        ids = M.sample_teacher(net, cond, steps, cfg_scale=13, gumbel=2, rng=Replay(run['uniforms']))
        assert torch.equal(ids, run['ids']), steps


def test_meissonic_sampler_draws_the_published_ids():
    net, x, _ = golden_meissonic()
    file = golden('e2e_meissonic')
    net.null_words.copy_(file['null_words'])
    net.null_pooled.copy_(file['null_pooled'])
    micro = torch.tensor([[*file['micro'], 0.0]]).repeat(2, 1)
    cond = (x['encoder_hidden_states'], x['pooled_projections'], micro)
    assert set(file['runs']) == {4, 8, 16}
    for steps, run in file['runs'].items():
        numbers = Replay(rng=rng(steps))
        ids = M.sample_teacher(net, cond, steps, cfg_scale=9, gumbel=2, rng=numbers)
        assert torch.equal(ids.view(2, 8, 8), run['ids']), steps
    assert (micro[:, 5] == 0).all()                            # the caller's own is untouched


@torch.no_grad()
def test_the_one_step_meissonic_equals_the_released_student():
    net, x, _ = golden_meissonic()
    file = golden('e2e_dimo')
    ids = as_ids(file['input_ids'], 39, 32)
    micro = torch.cat([file['micro'].float(), file['timestep'].float().expand(2)[:, None]], 1)
    cond = (x['encoder_hidden_states'], x['pooled_projections'], micro)
    noise = file['noise'].flatten(2).transpose(1, 2)           # (B, N, D)
    logits = net(ids, cond, file['sigma'], Replay([noise]))
    near(channels_first(logits), file['logits'])


def test_sampling_plans_of_maskgen_and_meissonic_equal_the_golden_tables():
    tables = golden('schedules')
    assert tables['maskgen']
    assert tables['meissonic']
    for name, table in tables['maskgen'].items():
        masked = table['masked_before_step'].tolist()
        plan = M.sampling_plan(len(masked), 128, 'maskgen')
        assert plan.counts == differences(masked), name
        guidance = [M.guidance_at(share, 13) - 1 for share in plan.guidance]     # c + s (c - u)
        near(torch.tensor(guidance), table['guidance_scale'].float().flatten(), 1e-5)
        near(torch.tensor(plan.tau), table['softmax_temperature'].float().flatten(), 1e-6)
    for name, table in tables['meissonic'].items():
        masked = table['masked_before_step'].tolist()
        plan = M.sampling_plan(len(masked), masked[0], 'meissonic')
        assert plan.counts == differences(masked), name
        near(2 * torch.tensor(plan.noise), table['temperature'].float().flatten(), 1e-6)
        assert set(plan.guidance) == {1.0}
        assert set(plan.tau) == {1.0}


def differences(masked):
    return [before - after for before, after in zip(masked, masked[1:] + [0])]


# -----------------------------------------------------------------------------
# The networks

TOKENIZERS = {'maskgen': mini_tatitok, 'meissonic': mini_vq}


def decoded(tokenizer, x):
    """Tokens to images; TA-TiTok gets a random guide."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.decode(x)
    shape = (len(x), tokenizer.config['T'], tokenizer.config['C'])
    return tokenizer.decode(x, torch.randn(shape, generator=rng(1)))


@torch.no_grad()
def test_a_one_hot_gives_exactly_the_hard_embedding_logits_and_image():
    for kind, make in NETWORKS.items():
        net = make()
        cond = condition(net)
        ids = random_ids(net)
        mask = torch.rand(ids.shape, generator=rng(3)) < 0.4
        for dtype in (torch.float32, torch.float64):
            for bf16 in (False, True):
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
                    soft = net.embed(one_hot(ids, net.V, dtype))
                    hard = net.embed(ids)
                    assert torch.equal(soft, hard)
                    assert soft.shape == (2, net.L, net.D)
                    soft = net.embed(one_hot(ids, net.V, dtype), mask)
                    assert torch.equal(soft, net.embed(ids.masked_fill(mask, net.mask_id)))
                    soft = net(one_hot(ids, net.V, dtype), cond)
                    hard = net(ids, cond)
                    assert torch.equal(soft, hard)
                    assert soft.shape == (2, net.N, net.V)
    for make in TOKENIZERS.values():
        tokenizer = make()
        ids = torch.randint(tokenizer.V, (2, tokenizer.N))
        for bf16 in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
                hard = decoded(tokenizer, ids)
                for dtype in (torch.float32, torch.float64):
                    assert torch.equal(decoded(tokenizer, one_hot(ids, tokenizer.V, dtype)), hard)


def test_gradients_of_probabilities_equal_finite_differences():
    torch.manual_seed(0)
    for make in NETWORKS.values():
        net = make().double()
        cond = tuple(part.double() for part in condition(net, B=1))
        probs = torch.randn(1, net.N, net.V).double().softmax(-1).requires_grad_()
        emb = net.embed(probs).detach().requires_grad_()

        def logits(p):
            return net(p, cond)

        def states(e):
            return net.features(e, cond, [1, 2])
        assert torch.autograd.gradcheck(logits, probs, fast_mode=True)
        assert torch.autograd.gradcheck(states, emb, fast_mode=True)
    for make in TOKENIZERS.values():
        tokenizer = make().double()
        probs = torch.randn(1, tokenizer.N, tokenizer.V).double().softmax(-1).requires_grad_()

        def image(p):
            return decoded(tokenizer, p)
        assert torch.autograd.gradcheck(image, probs, fast_mode=True)


@torch.no_grad()
def test_the_networks_have_the_interface_of_mdm():
    for net, hidden, grid in ((mini_maskgen(), 6, None), (mini_meissonic(), 4, (2, 2)),
                              (mini_meissonic(pool=1), 16, (4, 4)),
                              (mini_meissonic(V=24, D=24), 4, (2, 2))):     # V = D: told by the sum
        cond = condition(net, B=3)
        ids = random_ids(net, B=3, mask=True)
        assert net.grid == grid
        assert net.L == net.N
        assert net.mask_id == net.V
        depth = len(net.blocks)
        states = net.features(net.embed(ids), cond, [depth, 1])
        assert [state.shape for state in states] == [(3, hidden, net.D)] * 2
        assert torch.equal(states[1], net.features(net.embed(ids), cond, [1])[0])
        assert not torch.equal(*states)
        logits = net(ids, cond)
        assert torch.equal(net(net.embed(ids), cond), logits)
        assert not torch.equal(net(ids, cond, 0.5), logits)
        again = type(net)(**net.config).eval()
        again.load_state_dict(net.state_dict())
        assert torch.equal(again(ids, cond), logits)
        assert net.is_embedding(net.embed(ids))
        assert not net.is_embedding(ids)
        assert not net.is_embedding(one_hot(ids.clamp(max=net.V - 1), net.V))
        assert torch.equal(net.pooled(cond), cond[1])
        null = net.null(cond)
        assert len(null) == len(cond)
        assert torch.equal(null[0][2], net.null_words[0])
        assert torch.equal(null[1][2], net.null_pooled[0])
        assert null[2] is cond[2]
        assert not torch.equal(net(ids, null), logits)
        assert torch.equal(M.guided_logits(net, ids, cond, 1.0), logits)
        u = net(ids, null)
        guided = M.guided_logits(net, ids, cond, 3.0)
        near(guided, u + 3 * (logits - u), 1e-3)
        for changed in range(3):                               # every part of the condition counts
            other = list(cond)
            other[changed] = other[changed] + 1
            assert not torch.equal(net(ids, tuple(other)), logits)
        assert net.law in M.LAWS
        assert 'rope' not in net.state_dict()


def test_wrong_inputs_are_explained():
    for net in (mini_maskgen(), mini_meissonic()):
        cond = condition(net)
        ids = random_ids(net)
        with exits_with('embed expects ids', str(net.N)):
            net.embed(ids[:, :3])
        with exits_with('embed expects probabilities', str(net.V)):
            net.embed(torch.rand(2, net.N, 7))
        with exits_with('layers [9]', 'blocks 1 to'):
            net.features(net.embed(ids), cond, [9])
        for part, name in enumerate(('words', 'pooled', 'micro')):
            wrong = list(cond)
            wrong[part] = wrong[part][..., :-1]
            with exits_with(f'{name} of a condition', 'expected'):
                net(ids, tuple(wrong))
    with exits_with('grid 3', 'multiple of 2'):
        mini_meissonic(grid=3)
    with exits_with('axes (4, 4, 8)', 'sum 12'):
        mini_meissonic(axes=(4, 4, 8))
    with exits_with('n_head = 5'):
        mini_maskgen(n_head=5)
    tokenizer = mini_tatitok()
    ids = torch.zeros(2, 5, dtype=torch.long)
    guide = torch.zeros(2, 7, 10)
    with exits_with('captions or their guide'):
        tokenizer.decode(ids)
    with exits_with('no text encoder', 'tokenizer.text'):
        tokenizer.decode(ids, ['a', 'b'])
    with exits_with('guide', '(2, 7, 10)'):
        tokenizer.decode(ids, guide[:1])
    with exits_with('decode expects ids (B, 5)'):
        tokenizer.decode(ids[:, 1:], guide)
    with exits_with('probabilities (B, 5, 12)'):
        tokenizer.decode(torch.rand(2, 5, 3), guide)
    with exits_with('(B, 3, 16, 16)'):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))
    with exits_with('n_head = 3'):
        mini_tatitok(n_head=(3, 3))


def test_checkpointed_blocks_give_the_same_gradients():
    for make in NETWORKS.values():
        net = make().train()
        cond = condition(net)
        ids = random_ids(net)
        grads = []
        for checkpointing in (False, True):
            net.checkpointing = checkpointing
            net.zero_grad()
            net(ids, cond).square().sum().backward()
            grads.append([p.grad.clone() for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_bf16_keeps_the_residual_stream_in_float32():
    for make in NETWORKS.values():
        net = make()
        cond = condition(net)
        ids = random_ids(net)
        half = tuple(part.bfloat16() for part in cond)         # as a text tower may give it
        with torch.autocast('cpu', torch.bfloat16):
            states = net.features(net.embed(ids), half, [1, len(net.blocks)])
            logits = net(ids, half)
        assert {state.dtype for state in states} == {torch.float32}
        exact = net(ids, cond)
        assert (logits.float() - exact).abs().mean() < 0.02 * exact.std()


def test_the_embedding_parameters_are_those_of_dimo():
    frozen = {'maskgen': {'tok_emb.weight'},
              'meissonic': {'tok_emb.weight', 'input_proj.0.weight', 'input_proj.1.weight',
                            'head.0.weight', 'head.1.weight', 'head.2.weight'}}
    for kind, make in NETWORKS.items():
        net = make()
        kept = {id(p) for p in net.embedding_parameters()}
        names = {name for name, p in net.named_parameters() if id(p) in kept}
        assert names == frozen[kind]
    table = meissonic.meissonic_names(1, 2)
    theirs = {maskgen.published_name(name, table) for name in frozen['meissonic']}
    assert {name.split('.')[0] for name in theirs} == {'embed', 'mlm_layer'}


def test_a_miniature_learns_from_scratch_and_follows_its_condition():
    for cls, sizes in ((MaskGen, dict(N=16, V=32, D=48, depth=2, n_head=3, T=4, C=12, micro=16)),
                       (Meissonic, dict(V=32, D=48, n_joint=1, n_single=1, n_head=3, grid=4, T=4, C=12,
                                        axes=(4, 6, 6)))):
        torch.manual_seed(0)
        net = cls(**sizes)
        numbers = rng(1)
        patterns = torch.randint(0, 32, (4, 16), generator=numbers).repeat(4, 1)
        cond = tuple(part.repeat(4, *[1] * (part.dim() - 1)) for part in condition(net, B=4))
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3, betas=(0.9, 0.96))
        losses = []
        for _ in range(150):
            mask = M.mask_tokens(patterns, M.mask_ratio(torch.rand(16, generator=numbers)), numbers)
            logits = net(patterns.masked_fill(mask, 32), cond)
            losses.append(M.aux_loss(logits, patterns, mask))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[0] > 3 and sum(losses[-10:]) / 10 < 0.5, losses[-1]
        net.eval()
        tokens = M.sample_teacher(net, cond, 4, cfg_scale=1, gumbel=1, rng=numbers)
        assert (tokens == patterns).float().mean() > 0.9


# -----------------------------------------------------------------------------
# Samplers

def test_an_image_of_a_text_teacher_does_not_depend_on_its_batch():
    for make in NETWORKS.values():
        net = make()
        cond = condition(net, B=3)
        rngs = [rng(k) for k in range(3)]
        together = M.sample_teacher(net, cond, 4, cfg_scale=3, gumbel=2, rng=rngs)
        assert ((together >= 0) & (together < net.V)).all()
        alone = M.sample_teacher(net, tuple(part[1:2] for part in cond), 4, cfg_scale=3, gumbel=2,
                                 rng=[rng(1)])
        assert torch.equal(alone[0], together[1])


def test_every_law_samples_every_network_and_filters_codes():
    for make in NETWORKS.values():
        net = make()
        cond = condition(net)
        for law in M.LAWS:
            numbers = rng(0)
            tokens = M.sample_teacher(net, cond, 3, cfg_scale=2, gumbel=1, rng=numbers, law=law, top_k=1)
            assert tokens.shape == (2, net.N)
            assert tokens.max() < net.V
            passes = M.teacher_passes(net, 3, 2, law)
            assert passes == 3 + sum(share != 0 for share in M.sampling_plan(3, net.N, law).guidance)
        with exits_with('99'):
            M.sample_teacher(net, cond, 99)
        with exits_with("'magic'", 'maskgen or meissonic'):
            M.sampling_plan(3, net.N, 'magic')
    logits = torch.randn(2, 3, 8)
    for draw in (M.draw_by_logit, M.draw_by_probability):
        tokens, _ = draw(logits, 1.0, rng(0), 1, 0.0)
        assert torch.equal(tokens, logits.argmax(-1))


def test_maskgen_draws_from_the_softmax_at_the_product_of_its_temperatures():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    many = logits.expand(1, 40_000, 4)
    tokens, confidence = M.draw_by_logit(many, 0.8, rng(0), 0, 0.0)
    found = torch.bincount(tokens[0], minlength=4) / 40_000
    near(found, (logits / 0.8).softmax(-1), 0.01)
    assert torch.equal(confidence, logits[tokens])
    tokens, _ = M.draw_by_logit(many[:, :9], 0.0, None, 0, 0.0)
    assert (tokens == 2).all()


def test_meissonic_is_told_the_steps_that_are_left():
    net = mini_meissonic()
    cond = condition(net)
    told = []
    modulation = net.modulation

    def watched(cond):
        told.append(cond[2][:, 5].unique().item())
        return modulation(cond)
    net.modulation = watched
    M.sample_teacher(net, cond, 4, cfg_scale=9, gumbel=2, rng=rng(0))
    assert told == [3, 2, 1, 0]
    assert (cond[2][:, 5] == 0).all()


# -----------------------------------------------------------------------------
# Published files

def same_weights(found, expected):
    """Equal but for the null prompt, which no file holds."""
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for key, value in found.state_dict().items():
        if key.startswith('null_'):
            assert (value == 0).all()
        else:
            assert value.dtype == torch.float32 and torch.equal(value, theirs[key]), key


def test_text_teachers_of_the_published_sizes_have_the_published_parameter_counts():
    def count(network):
        return sum(p.numel() for p in network.parameters())
    with torch.device('meta'):
        for path, total in (('random', 604_311_552), ('random-xl', 1_176_611_840)):
            net = MaskGen(**maskgen.SIZES[path])
            assert count(net) + 1001 * net.D == total          # unused rows of the table
        net = Meissonic(**meissonic.SIZE)
        assert count(net) + (8256 - 8193) * net.D == 1_006_946_304
        assert count(TATiTok(**maskgen.TATITOK_SIZE)) == 391_046_292
        assert count(Tokenizer(**meissonic.VQ_SIZE)) == 146_244_675
        assert (net.N, net.V, net.grid) == (4096, 8192, (32, 32))
        names = meissonic.meissonic_names(14, 28)
        assert len({maskgen.published_name(key, names) for key in net.state_dict()}) == 867 + 2
        net = MaskGen(**maskgen.SIZES['random'])
        assert len(net.state_dict()) == 450 + 2                # 451 with lm_head, and the null prompt
        assert len(TATiTok(**maskgen.TATITOK_SIZE).state_dict()) == 462
        assert len(Tokenizer(**meissonic.VQ_SIZE).state_dict()) == 277


@torch.no_grad()
def test_text_teachers_of_the_published_sizes_run_on_the_meta_device():
    with torch.device('meta'):
        maskgen_l = MaskGen(**maskgen.SIZES['random'])
        large = Meissonic(**meissonic.SIZE).to('meta')         # the rotary table is never meta by itself
        monetico = Meissonic(**{**meissonic.SIZE, 'grid': 32, 'pool': 1}).to('meta')
        for net, hidden in ((maskgen_l, 128), (large, 1024), (monetico, 1024)):
            cond = (torch.empty(2, 77, net.config['C']), torch.empty(2, *net.null_pooled.shape[1:]),
                    torch.empty(2, net.n_micro))
            emb = net.embed(torch.empty(2, net.N, dtype=torch.long))
            assert emb.shape == (2, net.N, net.D)
            states = net.features(emb, cond, [1, len(net.blocks)])
            assert [state.shape for state in states] == [(2, hidden, net.D)] * 2
            assert net(emb, cond).shape == (2, net.N, net.V)
        tokenizer = TATiTok(**maskgen.TATITOK_SIZE)
        guide = torch.empty(1, 77, 768)
        assert tokenizer.decode(torch.empty(1, 128).long(), guide).shape == (1, 3, 256, 256)
        assert tokenizer.latents(torch.empty(1, 3, 256, 256)).shape == (1, 128, 64)
        vq = Tokenizer(**meissonic.VQ_SIZE)
        assert vq.decode(torch.empty(1, 4096).long()).shape == (1, 3, 1024, 1024)
        assert vq.latents(torch.empty(1, 3, 1024, 1024)).shape == (1, 4096, 64)


@torch.no_grad()
def test_networks_of_other_sizes_are_read_back_bit_for_bit():
    networks = [
        (mini_maskgen(V=128), {}), (mini_maskgen(N=9, V=1024, D=36, depth=1, n_head=3, C=8, micro=6), {}),
        (mini_maskgen(V=23, D=16, depth=4, n_head=4), dict(V=23)),
        (mini_meissonic(), {}), (mini_meissonic(n_joint=3, n_single=1, V=9, C=7), {}),
        (mini_meissonic(pool=1, grid=3), {}),
        (mini_meissonic(D=32, n_head=4, n_single=3, grid=6, axes=(2, 4, 2)), {})]
    for net, given in networks:
        net = type(net)(**{**net.config, 'T': 77})             # as no file tells
        shake(net)
        kind = net.law
        sizes = net.config
        given = dict(given, n_head=sizes['n_head'])
        if kind == 'meissonic':
            given.update(grid=sizes['grid'], axes=sizes['axes'])
        again = MDM.from_pretrained(kind, published_text(net), **given)
        assert again.config == sizes
        same_weights(again, net)
        again.null_words.copy_(net.null_words)
        again.null_pooled.copy_(net.null_pooled)
        cond = condition(net)
        ids = random_ids(net, mask=True)
        assert torch.equal(again(ids, cond), net(ids, cond))
    other = dict(image_size=24, patch=8, N=3, V=7, width=(24, 16), depth=(2, 1), n_head=(4, 1), T=3, C=6)
    for tokenizer in (mini_tatitok(), mini_tatitok(**other)):
        n_head = tokenizer.config['n_head']
        again = Tokenizer.from_pretrained('maskgen', published_text(tokenizer), n_head=n_head)
        assert again.config == tokenizer.config
        same_weights(again, tokenizer)
    for tokenizer in (mini_vq(), mini_vq(ch_mult='2,1', stem=64),
                      mini_vq(ch_mult='3,2,2,4', stem=96, n_res=2, up=3, mid=1),
                      mini_vq(ch=64, ch_mult='1,2', stem=64, code_dim=6, n_codes=40)):
        again = Tokenizer.from_pretrained('meissonic', published_text(tokenizer), grid=tokenizer.grid)
        same_weights(again, tokenizer)
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        assert torch.equal(again.encode(images), tokenizer.encode(images))
        assert again.config == tokenizer.config


def loaded(kind, what, path):
    """A miniature from its file, as a user loads it."""
    if kind == 'maskgen' and what == 'net':
        return MDM.from_pretrained(kind, path, n_head=2)
    if what == 'net':
        return MDM.from_pretrained(kind, path, grid=4, axes=(4, 2, 6))
    return Tokenizer.from_pretrained(kind, path, grid=4, n_head=(2, 3))


def miniatures():
    """{(kind, what): network} with T as published."""
    return {('maskgen', 'net'): mini_maskgen(T=77, V=128), ('meissonic', 'net'): mini_meissonic(T=77),
            ('maskgen', 'tokenizer'): mini_tatitok(), ('meissonic', 'tokenizer'): mini_vq()}


def test_dicts_files_folders_and_precisions_are_read_alike():
    for (kind, what), network in miniatures().items():
        weights = published_text(network)
        kept = {key: value.clone() for key, value in weights.items()}
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(f'{folder}/bin')
            os.makedirs(f'{folder}/safe')
            torch.save(weights, f'{folder}/bin/weights.bin')
            alone = {key: value for key, value in weights.items() if key != 'lm_head.weight'}
            save_safetensors(alone, f'{folder}/safe/model.safetensors')
            save_safetensors({key: value.half() for key, value in alone.items()}, f'{folder}/half.safetensors')
            for path in (weights, alone, f'{folder}/bin/weights.bin', f'{folder}/bin', f'{folder}/safe'):
                again = loaded(kind, what, path)
                same_weights(again, network)
                with torch.no_grad():
                    for p in again.parameters():
                        p.add_(1)                              # training touches neither dict nor file
            assert all(torch.equal(value, kept[key]) for key, value in weights.items())
            half = loaded(kind, what, f'{folder}/half.safetensors')
            for key, value in half.state_dict().items():
                if not key.startswith('null_'):
                    assert torch.equal(value, network.state_dict()[key].half().float())


def test_golden_weights_are_the_same_from_dict_bin_folder_and_safetensors():
    transformer = MDM.from_pretrained
    tokenizer = Tokenizer.from_pretrained
    for name, load, kind, given in (
            ('maskgen_vq', transformer, 'maskgen', dict(n_head=3)),
            ('tatitok', tokenizer, 'maskgen', dict(n_head=(2, 3))),
            ('meissonic_transformer', transformer, 'meissonic', dict(grid=8, axes=(4, 6, 6))),
            ('meissonic_vq', tokenizer, 'meissonic', dict(grid=4))):
        weights = golden(name)['state_dict']
        expected = load(kind, weights, **given).state_dict()
        with tempfile.TemporaryDirectory() as folder:
            torch.save(weights, f'{folder}/weights.bin')
            alone = {key: value.clone() for key, value in weights.items() if key != 'lm_head.weight'}
            save_safetensors(alone, f'{folder}/weights.safetensors')
            for path in (f'{folder}/weights.bin', folder, f'{folder}/weights.safetensors'):
                found = load(kind, path, **given).state_dict()
                assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_wrong_files_are_explained():
    networks = miniatures()
    files = {name: published_text(network) for name, network in networks.items()}
    for kind, what in networks:
        part = 'transformer' if what == 'net' else 'tokenizer'
        for other, weights in files.items():
            if other != (kind, what):
                with exits_with('the given dict: ', 'expected', f'a {kind} {part}', 'right file'):
                    loaded(kind, what, weights)
        whole = files[kind, what]
        optional = ('lm_head.weight', 'quantize.embed_prob')
        for key in list(whole)[::5]:
            if key not in optional:
                lost = {name: value for name, value in whole.items() if name != key}
                with exits_with('the given dict: ', 'expected'):
                    loaded(kind, what, lost)
                bent = {**whole, key: whole[key][..., None]}
                with exits_with('the given dict: ', key, 'expected'):
                    loaded(kind, what, bent)
    net = files['maskgen', 'net']
    with exits_with('16 heads', 'n_head='):
        MDM.from_pretrained('maskgen', net)
    with exits_with('V = 5000'):
        MDM.from_pretrained('maskgen', net, n_head=2, V=5000)
    net = files['meissonic', 'net']
    assert MDM.from_pretrained('meissonic', net, grid=4).config['axes'] == (4, 4, 4)     # in proportion
    with exits_with('axes (16, 56, 56)', 'axes=', 'sum 12'):
        MDM.from_pretrained('meissonic', net, axes=(16, 56, 56))
    with exits_with('3 heads of 12'):
        MDM.from_pretrained('meissonic', net, n_head=3, axes=(4, 2, 6))
    with exits_with('grid 5'):
        MDM.from_pretrained('meissonic', net, axes=(4, 2, 6), grid=5)
    tokenizer = files['maskgen', 'tokenizer']
    for n_head in ((3, 3), 2, (2, 3, 4), (2, 0)):
        with exits_with('n_head=('):
            Tokenizer.from_pretrained('maskgen', tokenizer, n_head=n_head)
    with exits_with("'magic'", 'maskgen, meissonic'):
        MDM.from_pretrained('magic', net)


def test_a_folder_of_the_whole_pipeline_says_which_part_is_meant():
    networks = miniatures()
    with tempfile.TemporaryDirectory() as folder:
        for part, what in (('transformer', 'net'), ('vqvae', 'tokenizer')):
            os.makedirs(f'{folder}/{part}')
            torch.save(published_text(networks['meissonic', what]), f'{folder}/{part}/diffusion_pytorch_model.bin')
            same_weights(loaded('meissonic', what, f'{folder}/{part}'), networks['meissonic', what])
        with exits_with('sub-folder', f'{folder}/transformer'):
            loaded('meissonic', 'net', folder)
        with exits_with('sub-folder', f'{folder}/vqvae'):
            loaded('meissonic', 'tokenizer', folder)


def test_random_weights_are_built_on_request():
    small = {'random': mini_maskgen().config, 'random-xl': mini_maskgen(depth=3).config}
    sizes_of_maskgen = dict(SIZES=small, TATITOK_SIZE=mini_tatitok().config)
    sizes_of_meissonic = dict(SIZE=mini_meissonic().config, VQ_SIZE=mini_vq().config)
    with mock.patch.multiple(maskgen, **sizes_of_maskgen), mock.patch.multiple(meissonic, **sizes_of_meissonic):
        assert len(MDM.from_pretrained('maskgen', 'random').blocks) == 2
        assert len(MDM.from_pretrained('maskgen', 'random-xl').blocks) == 3
        nets = [MDM.from_pretrained('meissonic', 'random') for _ in range(2)]
        assert torch.equal(nets[0].head[0].weight, nets[1].head[0].weight)
        for kind, cls in (('maskgen', TATiTok), ('meissonic', Tokenizer)):
            tokenizer = Tokenizer.from_pretrained(kind, 'random')
            assert type(tokenizer) is cls
            assert tokenizer.source['path'] == 'random'
            again = Tokenizer.from_checkpoint(tokenizer.pack())
            assert again.digest() == tokenizer.digest()


def test_the_text_guided_decoder_in_bf16_is_a_copy_that_draws_nearly_the_same():
    tokenizer = mini_tatitok().requires_grad_(False)
    guide = torch.randn(2, 7, 10)
    ids = torch.randint(tokenizer.V, (2, tokenizer.N))
    wanted = tokenizer.decode(ids, guide)
    assert torch.equal(tokenizer.decoder_in(torch.float32).decode(ids, guide), wanted)
    half = tokenizer.decoder_in(torch.bfloat16)
    found = half.decode(ids, guide)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert half.decoder is not tokenizer.decoder and half.encoder is None
    assert torch.equal(tokenizer.decode(ids, guide), wanted)
    z = torch.randn(2, tokenizer.N, tokenizer.V, requires_grad=True)
    half.decode(z.softmax(-1), guide).square().sum().backward()
    assert z.grad.norm() > 0


@torch.no_grad()
def test_a_checkpoint_rebuilds_the_text_guided_tokenizer():
    tokenizer = mini_tatitok()
    guide = torch.randn(2, 7, 10)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tokenizer.pack(), f'{folder}/small.pt')
        again = unpack_tokenizer(torch.load(f'{folder}/small.pt', weights_only=True))
        assert type(again) is TATiTok
        assert again.config == tokenizer.config
        assert again.text is None

        def text(captions):
            return guide[:len(captions)]
        again.text = text
        ids = torch.randint(12, (2, 5))
        assert torch.equal(again.decode(ids, ['a', 'b']), tokenizer.decode(ids, guide))
        torch.save(published_text(tokenizer), f'{folder}/tatitok.bin')
        found = Tokenizer.from_pretrained('maskgen', f'{folder}/tatitok.bin', n_head=(2, 3))
        packed = found.pack()
        assert packed['kind'] == 'maskgen'
        assert tuple(packed['n_head']) == (2, 3)
        assert 'net' not in packed
        torch.save(packed, f'{folder}/packed.pt')
        again = Tokenizer.from_checkpoint(torch.load(f'{folder}/packed.pt', weights_only=True))
        assert again.digest() == tokenizer.digest()


def test_images_outside_are_from_minus_one_to_one():
    tokenizer = mini_vq()
    plain = mini_vq(unit_range=False, stem=0)
    plain.load_state_dict(tokenizer.state_dict())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(tokenizer.latents(images), plain.latents((images + 1) / 2))
        ids = tokenizer.encode(images)
        assert torch.equal(tokenizer.decode(ids), plain.decode(ids) * 2 - 1)
    assert 'stem' not in plain.config                          # checkpoints of others stay as they are


PEAK = '''
import re, sys, torch
import common.teachers
from model import MDM
torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)
def peak():
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = peak()
net = MDM.from_pretrained(sys.argv[1], sys.argv[2], n_head=8, grid=8, axes=(16, 24, 24))
weights = sum(p.nbytes for p in net.parameters())
print((peak() - before) / weights)
'''


def test_loading_peaks_below_1_2_times_the_weights():
    nets = {'maskgen': MaskGen(16, 128, 512, 4, 8),
            'meissonic': Meissonic(64, 512, 2, 2, 8, grid=8, axes=(16, 24, 24))}
    with tempfile.TemporaryDirectory() as folder:
        for kind, net in nets.items():
            weights = published_text(net)
            weights.pop('lm_head.weight', None)
            torch.save(weights, f'{folder}/{kind}.bin')
            half = {key: value.half() for key, value in weights.items()}
            save_safetensors(half, f'{folder}/{kind}.safetensors')
        for kind, ending in (('maskgen', 'bin'), ('maskgen', 'safetensors'), ('meissonic', 'bin')):
            command = [sys.executable, '-c', PEAK, kind, f'{folder}/{kind}.{ending}']
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
            assert float(done.stdout.split()[-1]) < 1.2, (kind, ending, done.stdout)


# -----------------------------------------------------------------------------
# The tower

TOWERS = (('clip_text', 'gelu', 4), ('clip_text_quickgelu', 'quick_gelu', 4), ('clip_text_openai', 'quick_gelu', 2))


@torch.no_grad()
def equals_golden(tower, file):
    """All outputs of a golden file, of both paddings where it has both."""
    for ids, end in (('ids', ''), ('ids_pad0', '_pad0'), ('ids_padeot', '_padeot')):
        if ids in file['inputs']:
            out = tower(input_ids=file['inputs'][ids], output_hidden_states=True)
            near(out.hidden_states[-2], file['outputs'][f'penultimate{end}'])
            pooled = file['outputs'][f'pooled{end}']
            near(out.text_embeds, pooled.flatten(1))
            near(out.last_hidden_state, file['outputs'][f'last_hidden_normed{end}'])


def test_clip_text_towers_equal_the_golden_outputs_from_every_form_of_file(tmp_path):
    transformers_or_skip()
    for name, activation, n_head in TOWERS:
        file = golden(name)
        folder = tmp_path / name
        state = {key: value.clone() for key, value in file['state_dict'].items()}
        (folder / 'whole').mkdir(parents=True)
        (folder / 'shards').mkdir()
        save_safetensors(state, folder / 'tower.safetensors')
        torch.save({'state_dict': state}, folder / 'tower.bin')
        save_safetensors(state, folder / 'whole' / 'model.safetensors')
        half = {key: value.half() for key, value in state.items()}
        save_safetensors(half, folder / 'whole' / 'model.fp16.safetensors')
        shard(state, folder / 'shards', 'model', 'safetensors', save_safetensors)
        sources = [state, {'state_dict': state}]
        sources += [folder / part for part in ('tower.safetensors', 'tower.bin', 'whole', 'shards')]
        for source in sources:
            tower = load_tower(source, activation, n_head)
            equals_golden(tower, file)
            assert not tower.training
            for value in tower.parameters():
                assert value.dtype == torch.float32
                assert not value.requires_grad
                assert value.is_contiguous()
            assert not any(value.is_meta for value in (*tower.parameters(), *tower.buffers()))
        half = {key: value.half() for key, value in state.items()}
        save_safetensors(half, folder / 'half.safetensors')
        wanted = load_tower({key: value.float() for key, value in half.items()}, activation, n_head).state_dict()
        for source in (half, folder / 'half.safetensors'):
            found = load_tower(source, activation, n_head).state_dict()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_transformers_folder_says_its_activation_and_heads(tmp_path):
    transformers = transformers_or_skip()
    for name, activation, n_head in TOWERS[:2]:
        file = golden(name)
        config = transformers.CLIPTextConfig(**file['config'])
        tower = transformers.CLIPTextModelWithProjection(config)
        tower.load_state_dict(file['state_dict'])
        tower.save_pretrained(tmp_path / name)
        with capture() as note:
            found = load_tower(tmp_path / name, activation)
        equals_golden(found, file)
        assert note.getvalue() == ''
    with capture() as note:
        found = load_tower(tmp_path / name, 'gelu')
    assert 'config.json says quick_gelu' in note.getvalue()
    assert found.config.hidden_act == 'quick_gelu'
    text = file['config']                                            # a folder of a whole CLIP, as LAION's
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(text_config={**text, 'projection_dim': 512}, projection_dim=24,
                                     vision_config=dict(**sizes, image_size=32, patch_size=16))
    whole = transformers.CLIPModel(config)
    whole.load_state_dict(file['state_dict'], strict=False)
    whole.half().save_pretrained(tmp_path / 'whole')
    config_path = tmp_path / 'whole' / 'config.json'
    config_path.write_text(config_path.read_text().replace('"eos_token_id": 63', '"eos_token_id": 2'))   # old files
    tower = load_tower(tmp_path / 'whole', 'quick_gelu')
    half = {key: value.half().float() for key, value in file['state_dict'].items()}
    again = load_tower(half, 'quick_gelu', 4)
    for ids in file['inputs'].values():
        assert torch.equal(tower(input_ids=ids).text_embeds, again(input_ids=ids).text_embeds)
    config_path.write_text('{')
    with exits_with('cannot load', tmp_path / 'whole'):
        load_tower(tmp_path / 'whole', 'quick_gelu')


def test_other_keys_of_a_clip_are_skipped_and_wrong_files_named(tmp_path):
    transformers_or_skip()
    huggingface = golden('clip_text')['state_dict']
    openai = golden('clip_text_openai')['state_dict']
    more = {'vision_model.x': torch.ones(1), 'visual_projection.weight': torch.ones(1), 'logit_scale': torch.ones(()),
            'text_model.embeddings.position_ids': torch.arange(16)[None]}
    load_tower({**huggingface, **more}, 'gelu', 4)
    load_tower({**openai, 'visual.proj': torch.ones(1), 'attn_mask': torch.ones(16, 16), 'vocab_size': torch.tensor(64),
                'context_length': torch.tensor(16), 'input_resolution': torch.tensor(336)}, 'quick_gelu', 2)
    with capture() as text:
        load_tower({**huggingface, 'foreign': torch.ones(1)}, 'gelu', 4)
    assert '1 tensors are not needed and left out, the first is foreign' in text.getvalue()
    for state, n_head in ((huggingface, 4), (openai, 2)):
        for key in state:
            if key.startswith(('visual', 'logit')):
                continue
            with exits_with('the given dict',
                            key.split('.')[-1] if key != 'positional_embedding' else 'token_embedding',
                            'expected'):
                load_tower({k: v for k, v in state.items() if k != key}, 'gelu', n_head)
            with exits_with('expected', 'has shape'):
                load_tower({**state, key: state[key][..., None]}, 'gelu', n_head)
    with exits_with('width 32', '0 heads', 'n_head'):
        load_tower(huggingface, 'gelu')
    with exits_with('width 32', '5 heads', 'n_head'):
        load_tower(huggingface, 'gelu', 5)
    with exits_with('quick_gelu or gelu', 'relu'):
        load_tower(huggingface, 'relu', 4)
    with exits_with('token_embedding', 'begins with'):
        load_tower(golden('maskgen_vq')['state_dict'], 'gelu')
    assert load_tower(openai, 'quick_gelu').config.num_attention_heads == 1       # width 64, as published
    (tmp_path / 'text_encoder').mkdir()
    (tmp_path / 'transformer').mkdir()
    torch.save(huggingface, tmp_path / 'text_encoder' / 'model.bin')
    torch.save(huggingface, tmp_path / 'transformer' / 'model.bin')
    with exits_with(f'name {tmp_path}/text_encoder'):
        load_tower(tmp_path, 'gelu')
    with exits_with('nowhere.bin: no such file'):
        load_tower(f'{tmp_path}/nowhere.bin', 'gelu')
    with exits_with('tower.safetensors: no such file'):
        load_tower('nowhere/tower.safetensors', 'gelu')
    with mock.patch.dict(sys.modules, transformers=None):
        with exits_with('pip install transformers'):
            load_tower(huggingface, 'gelu', 4)


def published_shapes(layers, width):
    """A state dict on the meta device in a published size and open_clip's layout, in half precision."""
    with torch.device('meta'):
        state = {'token_embedding.weight': torch.empty(49408, width), 'positional_embedding': torch.empty(77, width),
                 'ln_final.weight': torch.empty(width), 'ln_final.bias': torch.empty(width),
                 'text_projection': torch.empty(width, width)}
        for k in range(layers):
            for key, shape in (('attn.in_proj_weight', (3 * width, width)), ('attn.in_proj_bias', (3 * width,)),
                               ('attn.out_proj.weight', (width, width)), ('attn.out_proj.bias', (width,)),
                               ('ln_1.weight', (width,)), ('ln_1.bias', (width,)), ('ln_2.weight', (width,)),
                               ('ln_2.bias', (width,)), ('mlp.c_fc.weight', (4 * width, width)),
                               ('mlp.c_fc.bias', (4 * width,)), ('mlp.c_proj.weight', (width, 4 * width)),
                               ('mlp.c_proj.bias', (width,))):
                state[f'transformer.resblocks.{k}.{key}'] = torch.empty(shape, dtype=torch.float16)
    return state


def test_the_published_towers_are_recognised_by_their_shapes():
    transformers_or_skip()
    for layers, width, n_head, count in ((12, 768, 12, 123_650_304), (24, 1024, 16, 354_032_640)):
        tower = load_tower(published_shapes(layers, width), 'gelu')
        assert sum(value.numel() for value in tower.parameters()) == count
        config = tower.config
        assert (config.num_attention_heads, config.num_hidden_layers, config.intermediate_size,
                config.max_position_embeddings, config.eos_token_id) == (n_head, layers, 4 * width, 77, 49407)


# -----------------------------------------------------------------------------
# Its words, and both together

def mini_encoder(folder, places=77):
    transformers_or_skip()
    size = save_words(folder / 'tokenizer', ['a', 'red', 'circle', 'blue', 'square'])
    save_tower(folder / 'text_encoder', size, max_position_embeddings=places)
    return load_text_encoder(folder / 'text_encoder', 'gelu')         # the tokenizer lies beside it


PROMPTS = ['a red circle', '', 'a blue square above a red circle', 'a red circle', 'two Red   circles!']


def test_an_encoding_is_the_published_one_and_does_not_depend_on_its_batch(tmp_path):
    encoder = mini_encoder(tmp_path)
    ids = encoder.token_ids(PROMPTS)
    end = len(encoder.tokenizer) - 1
    assert ids.shape == (5, 77)
    assert ids.dtype == torch.int64
    assert ids[1].tolist() == [end - 1, end] + [0] * 75
    assert torch.equal(ids[0], ids[3])
    assert not torch.equal(ids[0], ids[2])
    wanted = encoder.tokenizer(PROMPTS, truncation=True, max_length=77)['input_ids']
    for row, found in zip(wanted, ids):
        assert found.tolist() == row + [0] * (77 - len(row))
    words, pooled, guide = encoder(PROMPTS)
    assert words.shape == (5, 77, 32)
    assert pooled.shape == (5, 24)
    assert guide.shape == (5, 77, 32)
    with torch.no_grad():
        for k in range(5):
            out = encoder.tower(input_ids=ids[k:k + 1], output_hidden_states=True)
            assert torch.equal(out.hidden_states[2][0], words[k])
            assert torch.equal(out.text_embeds[0], pooled[k])
            assert torch.equal(out.last_hidden_state[0], guide[k])
            state = encoder.tower.text_model.final_layer_norm(out.hidden_states[2])
            assert not torch.allclose(state, out.last_hidden_state)  # the penultimate, not the last without norm
    alone = encoder.encode(PROMPTS[2:3])
    together = encoder.encode(PROMPTS[::-1])
    for a, b, c in zip((words, pooled, guide), alone, together):
        assert torch.equal(a[2:3], b)
        assert torch.equal(a, c.flip(0))
        assert not a.requires_grad
        assert a.dtype == torch.float32
        assert a.device.type == 'cpu'
    with torch.autocast('cpu', torch.bfloat16):
        encoder.known.clear()
        assert all(torch.equal(a, b) for a, b in zip(encoder(PROMPTS), (words, pooled, guide)))
    alone[0].zero_()                                                 # what is remembered is not given away
    assert torch.equal(encoder(PROMPTS)[0], words)


def test_evaluation_prompts_are_remembered_and_training_prompts_are_not(tmp_path):
    encoder = mini_encoder(tmp_path)
    encoder.keep = 3
    encoder.batch = 2
    passes = []
    real = encoder.encode_ids

    def counted(ids):
        passes.append(len(ids))
        return real(ids)
    encoder.encode_ids = counted
    wanted = encoder(PROMPTS)
    assert passes == [1] * 4
    assert list(encoder.known) == [PROMPTS[2], PROMPTS[3], PROMPTS[4]]
    encoder(PROMPTS[2:])
    assert passes == [1] * 4
    encoder([''])                                                    # forgotten, and the bits are the same
    assert passes == [1] * 5
    assert torch.equal(encoder([''])[1], wanted[1][1:2])
    before = list(encoder.known)
    passes[:] = []
    found = encoder(PROMPTS, training=True)
    assert passes == [2, 2, 1]
    assert list(encoder.known) == before
    encoder.known.clear()
    again = encoder(PROMPTS, training=True)                          # whatever is remembered: a resumed run
    for a, b, c in zip(found, again, wanted):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-5)
        assert not a.requires_grad


def test_a_prompt_that_is_cut_keeps_its_end_and_is_told_once(tmp_path):
    with capture() as note:
        encoder = mini_encoder(tmp_path, places=24)
    assert note.getvalue() == ''
    exact = 'red ' * 22
    longer = 'red ' * 23
    with capture() as text:
        found = encoder.token_ids([exact, longer, longer + 'blue'])
    note = text.getvalue()
    assert note.count('\n') == 1
    assert '25 pieces' in note
    assert 'reads 24' in note
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert found[2, -1] == found.max()
    assert printed(encoder, ['blue ' * 40]) == ''
    assert printed(mini_encoder(tmp_path, places=24).token_ids, [exact]) == ''


def test_a_tokenizer_that_cannot_read_is_refused(tmp_path):
    transformers = transformers_or_skip()
    size = save_words(tmp_path / 'good')
    tower = save_tower(tmp_path / 'tower', size)
    TextEncoder(tower, load_words(tmp_path / 'good'))                # letters are enough
    invented = transformers.CLIPTokenizer.from_pretrained(str(tmp_path / 'tower'))
    with exits_with('knows 0 of 10 common words', 'cannot tell prompts apart'):
        TextEncoder(tower, invented)
    with exits_with('no word files', 'vocab.json and merges.txt'):
        load_text_encoder(tmp_path / 'tower', 'gelu')
    with exits_with('word files'):
        load_words({})
    load_text_encoder(tmp_path / 'tower', 'gelu', words_path=tmp_path / 'good')
    load_text_encoder(tmp_path / 'tower' / 'model.safetensors', 'gelu', 2, tmp_path / 'good')

    def always(captions):
        return [[7, 9]] * len(captions)

    def lengths(captions):
        return torch.tensor([[7] + [8] * len(c) + [9] + [0] * (99 - len(c)) for c in captions])

    def some(captions):                                              # three words are known
        return [[7, *({'a': 1, 'red': 2, 'two': 3}.get(word, 8) for word in c.split()), 9] for c in captions]
    for encode_ids, known in ((always, 0), (lengths, 0), (some, 3)):
        with exits_with(f'knows {known} of 10'):
            check_reads_text(encode_ids)
    larger = save_words(tmp_path / 'larger', ['red', 'circle'])
    with exits_with(f'has {larger} ids', f'the text tower {size}'):
        TextEncoder(tower, load_words(tmp_path / 'larger'))
    other = save_tower(tmp_path / 'other', size + 20)
    with exits_with(f'with id {size - 1}', f'looks for {size + 19}'):
        TextEncoder(other, load_words(tmp_path / 'good'))
    old = save_tower(tmp_path / 'old', size, eos_token_id=2)         # 2 stands for the largest id
    with torch.no_grad():
        a = TextEncoder(old, load_words(tmp_path / 'good'))(['a red'])[1]
        b = TextEncoder(tower, load_words(tmp_path / 'good'))(['a red'])[1]
    assert torch.equal(a, b)


HUB = """
import sys
sys.path.insert(0, {here!r})
from common.text import load_text_encoder, load_tower
encoder = load_text_encoder('me/tower', 'gelu')
print(tuple(encoder(['a red circle'])[1].shape))
for name in ('me/pickled', 'me/half', 'me/nowhere'):
    try:
        load_tower(name, 'gelu')
        print('no error')
    except ValueError as error:
        print(error)
"""


def test_a_hub_id_is_read_from_safetensors_only(tmp_path):
    transformers_or_skip()

    def snapshot(name):
        folder = tmp_path / f'models--me--{name}'
        (folder / 'refs').mkdir(parents=True)
        (folder / 'refs' / 'main').write_text('0' * 40)
        return folder / 'snapshots' / ('0' * 40)
    for name in ('tower', 'pickled', 'half'):
        tower = save_tower(snapshot(name), save_words(tmp_path / f'models--me--{name}/snapshots' / ('0' * 40)))
    (tmp_path / 'models--me--pickled/snapshots' / ('0' * 40) / 'model.safetensors').unlink()
    torch.save(tower.state_dict(), tmp_path / 'models--me--pickled/snapshots' / ('0' * 40) / 'pytorch_model.bin')
    half = {key: value for key, value in tower.state_dict().items() if 'layers.1.mlp' not in key}
    half_path = tmp_path / 'models--me--half/snapshots' / ('0' * 40) / 'model.safetensors'
    half_path.unlink()
    tower.save_pretrained(half_path.parent, state_dict=half)
    out = subprocess.run([sys.executable, '-c', HUB.format(here=HERE)], capture_output=True, text=True, check=True,
                         env=dict(os.environ, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE='1'))
    lines = out.stdout.splitlines()
    assert len(lines) == 4 and lines[0] == '(1, 24)', out.stdout
    assert lines[1].startswith('cannot load a CLIP text tower from me/pickled')
    assert 'me/half' in lines[2]
    assert 'layers.1.mlp' in lines[2]
    assert 'me/nowhere' in lines[3]


# -----------------------------------------------------------------------------
# Prompts from a file

def test_every_kind_of_prompt_file_holds_the_same_prompts(tmp_path):
    wanted = ['a cat', 'a dog, "two" birds', 'ein Vögelchen 🐦', 'the last one']
    (tmp_path / 'a.txt').write_bytes('\ufeffa cat\r\n\n  a dog, "two"   birds \n \t\nein Vögelchen 🐦\nthe last one'.encode())
    lines = [json.dumps(dict(seed=1, prompt=p), ensure_ascii=k % 2 == 0) for k, p in enumerate(wanted)]
    (tmp_path / 'b.jsonl').write_text('\n\n'.join([*lines, json.dumps({'prompt': ' '})]) + '\n', encoding='utf-8')
    (tmp_path / 'c.json').write_text(json.dumps([*wanted, '  ']))
    (tmp_path / 'd.json').write_text(json.dumps([dict(prompt=p) for p in wanted]))
    with open(tmp_path / 'e.CSV', 'w', encoding='utf-8-sig', newline='') as file:
        table = csv.writer(file)
        table.writerows([['id', 'text'], *enumerate(wanted[:1]), [7, 'a dog,\n"two" birds'], [8]])
        table.writerows(enumerate(wanted[2:]))
    for name in ('a.txt', 'b.jsonl', 'c.json', 'd.json', 'e.CSV'):
        prompts = prompt_source(tmp_path / name)
        assert isinstance(prompts, PromptFile)
        assert len(prompts) == 4
        assert list(prompts) == prompts[:] == read_prompts(tmp_path / name) == wanted, name
        assert prompts[-1] == prompts[torch.tensor(3)] == wanted[3]
        assert prompts[1:3] == wanted[1:3]
        with contextlib.suppress(IndexError):
            raise AssertionError(f'a prompt too many: {prompts[4]}')
        packed = prompts.pack()
        assert packed == dict(path=str(tmp_path / name), digest=prompts.digest, first=wanted)
        torch.save(packed, tmp_path / 'packed.pt')
        packed = torch.load(tmp_path / 'packed.pt', weights_only=True)
        same_prompts(PromptFile(tmp_path / name).pack(), packed)
        moved = tmp_path / f'moved_{name}'
        moved.write_bytes((tmp_path / name).read_bytes())
        same_prompts(PromptFile(moved).pack(), packed)
        (tmp_path / name).write_bytes(moved.read_bytes().replace(b'cat', b'cow'))
        with exits_with(name, 'has changed since the checkpoint was made', 'a cat'):
            same_prompts(PromptFile(tmp_path / name).pack(), packed)


def test_a_wrong_prompt_file_is_one_line_with_the_place(tmp_path):
    def refused(name, text, *parts):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with exits_with(path, *parts):
            prompt_source(path)
    with exits_with('no.txt: no such file', '.jsonl'):
        prompt_source(tmp_path / 'no.txt')
    with exits_with(tmp_path, 'no such file'):
        prompt_source(tmp_path)
    refused('a.lst', 'a cat', 'unknown kind', '.txt', '.csv')
    for name in ('a.txt', 'a.jsonl'):
        refused(name, '', 'no prompts')
        refused(name, ' \n\n', 'no prompts')
    refused('a.json', '[]', 'no prompts')
    refused('a.csv', 'text\n', 'no prompts')
    refused('a.csv', '', 'expected the column text, it has none')
    refused('a.csv', 'id,caption\n1,a cat\n', 'expected the column text, it has id, caption')
    refused('a.csv', 'text\n' + 'x' * 200_000, 'line 2', 'field')
    refused('a.csv', 'text\na red circle, left of a square\n', 'line 2', 'needs quotes')
    refused('a.csv', 'text\n"a green\na blue circle\n', 'is a quote missing')
    refused('a.json', '', 'not JSON')
    refused('a.json', '["a",\n "b"\n "c"]', 'not JSON', 'line 3')
    refused('a.json', '{"prompt": "a cat"}', 'a list of strings')
    refused('a.json', '["a", 3]', 'entry 2', 'got 3')
    refused('a.json', '["a", {"text": "b"}]', 'entry 2', 'expected the key prompt, it has text')
    refused('a.json', '[' * 100_000, 'not JSON')
    refused('a.json', '["\\ud800"]', 'entry 1', 'half of a character')
    good = '{"prompt": "a cat"}\n'
    refused('a.jsonl', good + '\n{"prompt": "a dog"', 'line 3', 'not JSON')
    refused('a.jsonl', good + 'a dog\n', 'line 2', 'not JSON')
    refused('a.jsonl', good + '["a dog"]\n', 'line 2', 'expected a text, got [')
    refused('a.jsonl', good + '{"text": "a dog", "n": 1}\n', 'line 2', 'it has text, n')
    refused('a.jsonl', good + '{"prompt": null}\n', 'line 2', 'got None')
    refused('a.jsonl', good + '[' * 100_000, 'line 2', 'not JSON')
    for name in ('a.txt', 'a.jsonl'):
        refused(name, good.encode() + b'\n{"prompt": "\xe9t\xe9"}', 'line 3', 'not UTF-8')
    refused('a.txt', 'a cat'.encode('utf-16'), 'line 1', 'not UTF-8')
    refused('a.json', b'["\xe9"]', 'not UTF-8')
    refused('a.csv', b'text\n\xe9\n', 'not UTF-8')


def test_a_large_prompt_file_is_read_here_and_there_without_being_held(tmp_path):
    n = 200_000
    lines = [f'prompt {k} of a thing that is {k % 97} wide' for k in range(n)]
    (tmp_path / 'a.txt').write_text('\n'.join(lines))
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps(dict(prompt=line)) for line in lines))
    index = [random.Random(0).randrange(n) for _ in range(1000)]
    for name in ('a.txt', 'b.jsonl'):
        prompts = prompt_source(tmp_path / name)
        clock = time.perf_counter()
        found = [prompts[k] for k in index]
        seconds = time.perf_counter() - clock
        assert found == [lines[k] for k in index] and seconds < 0.5, seconds
        assert len(prompts) == n
        assert prompts.begins.nbytes == 8 * n
        assert prompts.listed is None
        assert len(json.dumps(prompts.pack())) < 30_000


# -----------------------------------------------------------------------------
# Miniatures of both teachers through every stage

COLORS = ('red', 'green', 'blue', 'grey')
SHAPES = ('circle', 'square', 'star')
PICTURED = [f'a {color} {shape}' for color in COLORS for shape in SHAPES]
WORDS_KNOWN = ['a', *COLORS, *SHAPES, 'yellow', 'two', 'above', 'left']
KINDS = ('maskgen', 'meissonic')
SPREAD = {'maskgen': 0.2, 'meissonic': 1.0}    # of a text tower that its miniature can soon tell apart
V = 16                                         # codes of both
SETTINGS = {'maskgen': '--teacher_heads=2', 'meissonic': '--teacher_heads=2 --teacher_grid=4'}


def release_networks(kind):
    """A transformer of random weights and its tokenizer, of one release, in small."""
    torch.manual_seed(0)
    if kind == 'maskgen':
        net = MaskGen(N=8, V=V, D=32, depth=2, n_head=2, T=77, C=24, micro=8)
        tokenizer = mini_tatitok(N=8, V=V, width=(24, 32), n_head=(12, 16), T=77, C=24)
    else:
        net = Meissonic(V=V, D=32, n_joint=1, n_single=1, n_head=2, grid=4, T=77, C=24, axes=(4, 6, 6))
        for p in net.parameters():             # it learns sooner from wider weights
            if p.dim() == 2:
                p.data *= 1.7
        net.time_mlp[2].weight.data.zero_()    # and where the text alone modulates at first
        net.cond_mlp[0].weight.data[:, net.D:] = 0
        tokenizer = mini_vq(ch_mult='1,1,1', n_codes=V)
    return net, tokenizer


def pictures(N):
    """Each prompt has two pictures: four codes, each on N / 4 neighbouring places: tokens (prompts, 2, N)."""
    codes = torch.randint(V, (len(PICTURED), 2, 2, 2), generator=rng(7))
    if N == 16:                                # a grid of 4 x 4
        return codes.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2)
    return codes.flatten(2).repeat_interleave(N // 4, 2)


def followed(tokens, which):
    """The share of the tokens (B, N) that agree with the nearer picture of the prompts `which` (B,)."""
    wanted = pictures(tokens.shape[1])[which]
    agreement = (tokens[:, None] == wanted).float().mean(2)    # (B, 2)
    return float(agreement.max(1).values.mean())


def part_of(cond, index):
    return tuple([part[index] for part in cond])


def train_release(kind, net, cond, steps=300, B=16):
    """Masked diffusion on the pictures of the prompts."""
    numbers = rng(1)
    patterns = pictures(net.N)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, betas=(0.9, 0.96))
    for _ in range(steps):
        which = torch.randint(len(PICTURED), (B,), generator=numbers)
        tokens = patterns[which, torch.randint(2, (B,), generator=numbers)]
        ratio = M.mask_ratio(torch.rand(B, generator=numbers))
        ratio[::2] = 1                         # where only the text tells the picture
        mask = M.mask_tokens(tokens, ratio, numbers)
        given = part_of(cond, which)
        if kind == 'meissonic':                # its sampler tells the steps that are left
            given[2][:, 5] = torch.randint(8, (B,), generator=numbers)
        logits = net(tokens.masked_fill(mask, net.mask_id), given)
        loss = M.aux_loss(logits, tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()


def imported_transformers():
    """What every script asks it for, so that a forked one finds it in memory."""
    package = transformers_or_skip()
    return [package.CLIPTextModelWithProjection, package.CLIPTokenizer, package.CLIPModel, package.AutoTokenizer]


@functools.cache
def release(kind):
    """A folder as a user has downloaded it: transformer, tokenizer, text encoder, prompts, trained on the pictures."""
    imported_transformers()
    with made_once(f'release_{kind}') as (folder, done):
        if not done:
            make_release(kind, pathlib.Path(folder))
    return folder


def make_release(kind, folder):
    net, tokenizer = release_networks(kind)
    size = save_words(folder / 'text/tokenizer', WORDS_KNOWN)
    activation = {'maskgen': 'quick_gelu', 'meissonic': 'gelu'}[kind]
    save_tower(folder / 'text/text_encoder', size, spread=SPREAD[kind], hidden_size=24,
               projection_dim=net.null_pooled.shape[1], hidden_act=activation)
    (folder / 'prompts.txt').write_text('\n'.join(PICTURED))
    torch.save(published_text(tokenizer), folder / 'tokenizer.bin')
    torch.save(published_text(net), folder / 'untrained.bin')
    loaded = teacher_of(kind, folder, 'untrained.bin')
    train_release(kind, net.train(), loaded.encode(PICTURED))
    weights = published_text(net)
    weights.pop('lm_head.weight', None)
    save_safetensors(weights, folder / 'net.safetensors')


def teacher_of(kind, folder, name='net.safetensors'):
    return load_teacher(kind, f'{folder}/{name}', f'{folder}/tokenizer.bin', n_head=2,
                        text_path=f'{folder}/text/text_encoder', prompts=f'{folder}/prompts.txt',
                        grid=4 if kind == 'meissonic' else 0)


def drawn_by(net, loaded, captions):
    """Tokens of a one-step generator for the captions, (len(captions), N)."""
    sample = M.student_sampler(net, 0.8, 0.1, 1.0)
    return sample(loaded.encode(captions), [rng(k) for k in range(len(captions))])


def test_a_student_of_a_text_teacher_follows_its_prompt_more_often_after_distillation():
    for kind in KINDS:
        loaded = teacher_of(kind, release(kind))
        which = torch.arange(12).repeat(4)
        captions = [PICTURED[k] for k in which]
        tokens = M.sample_teacher(loaded.net, loaded.encode(captions), 8, cfg_scale=1, gumbel=0, rng=rng(3))
        learned = followed(tokens, which)
        assert learned > 0.4, (kind, learned)
        before = followed(drawn_by(loaded.net, loaded, captions), which)
        nets = SimpleNamespace(teacher=loaded.net)
        for name in ('generator', 'aux', 'generator_ema'):
            trained = name != 'generator_ema'
            setattr(nets, name, copy_of(loaded.net, loaded.net.state_dict(), kind, trained, frozen_tables=trained))
        optimizers = dict(generator=make_optimizers(nets.generator, 0.0, 2e-3, (0.9, 0.99)),
                          aux=make_optimizers(nets.aux, 0.0, 4e-3, (0.9, 0.99)))
        process = SimpleNamespace(rank=0, world=1, device=torch.device('cpu'), micro=16, accumulate=1,
                                  autocast=contextlib.nullcontext())
        chosen = dict(steps=100, warmup=5, cooldown=0.5, r_init=0.8, sigma_init=0.1, tau=1.0, beta=0.0, cfg_scale=1.5,
                      p_full=0.25, p_near=0.5, ema_decay=0.9, log_every=200)
        with mock.patch.multiple(distill, **chosen):
            for step in range(100):
                distill.update(nets, optimizers, loaded, process, step)
        tokens = drawn_by(nets.generator_ema, loaded, captions)
        after = followed(tokens, which)
        wrong = followed(tokens, which.roll(1))
        print(f'{kind}: teacher {learned:.3f}, student {before:.3f} -> {after:.3f}, wrong prompts {wrong:.3f}')
        assert after > before + 0.04
        assert after > wrong + 0.1


def captioned_images(folder):
    """Twelve pictures of 16 pixels with their captions."""
    os.makedirs(folder)
    lines = ['file_name,text']
    colors = np.random.RandomState(0).randint(0, 255, (len(PICTURED), 4, 4, 3), dtype=np.uint8)
    for k, caption in enumerate(PICTURED):
        Image.fromarray(colors[k]).resize((16, 16)).save(f'{folder}/{k:02d}.png')
        lines.append(f'{k:02d}.png,{caption}')
    pathlib.Path(f'{folder}/metadata.csv').write_text('\n'.join(lines))


def files_of(kind):
    """The settings that name the files of a release."""
    folder = release(kind)
    return (f'--teacher={kind} --teacher_path={folder}/net.safetensors --tokenizer_path={folder}/tokenizer.bin '
            f'--text_path={folder}/text/text_encoder --prompts={folder}/prompts.txt {SETTINGS[kind]}')


RECIPE = '--warmup=2 --generator_lr=1e-4 --aux_lr=1e-3 --ema_decay=0.9 --micro_batch=4'     # small instead of its own
SHORT = f'{RECIPE} --steps=4 --save_every=2 --teacher_steps=2 --n_eval=8 --n_reference=6'


def judges(clip):
    """Settings of published rewards whose files are a tiny CLIP: one weighs, one is held out."""
    return (f'--clip_path={clip} --pick_path={clip} --w_clip=0 --w_clipscore=0.1 --w_hps=0 --w_imagereward=0 '
            '--held_out=pick')


@functools.cache
def staged(kind):
    """A release taken through distillation, GAN and rewards, once -> (folder, {stage: what it printed})."""
    files = files_of(kind)
    with made_once(f'staged_{kind}') as (folder, done):
        if not done:
            take_stages(files, folder)
    texts = {}
    for stage in ('distill', 'gan', 'reward'):
        texts[stage] = pathlib.Path(f'{folder}/{stage}.txt').read_text()
    return folder, texts


def stages_from(folder, files):
    """{stage: its settings}, each from the checkpoint of the one before in the folder."""
    return {'distill': f'{files} {SHORT} --cfg_scale=1.5',
            'gan': f'--init={folder}/distill.pt --data={folder}/data {SHORT} --disc_warmup=1 --w_gan=2',
            'reward': f'--init={folder}/gan.pt {judges(folder + "/clip")} {SHORT}'}


def take_stages(files, folder):
    tiny_clip(f'{folder}/clip')
    captioned_images(f'{folder}/data')
    for stage, command in stages_from(folder, files).items():
        text = must_run(f'{stage}.py --out_dir={folder} {command}')
        pathlib.Path(f'{folder}/{stage}.txt').write_text(text)


def saved(folder, stage):
    return torch.load(f'{folder}/{stage}.pt', weights_only=True)


def test_both_text_teachers_go_through_distillation_gan_and_rewards_by_their_recipes():
    for kind in KINDS:
        folder, texts = staged(kind)
        net, _ = release_networks(kind)
        for stage, text in texts.items():
            assert f'recipe of --teacher={kind}' in text, (kind, stage)
            state = saved(folder, stage)
            assert state['kind'] == kind
            assert state['prompts']['first'] == PICTURED
            assert set(state['tokenizer']) >= {'kind', 'path', 'digest'}         # not its weights
            assert state['config']['text_path'] == f'{release(kind)}/text/text_encoder'
            assert 'net' not in state['tokenizer']
        assert 'no data, no table' in texts['distill']
        assert '12 real images' in texts['gan'].replace('24', '12')              # mirrored ones, too, where asked
        assert 'gan, 1 step' in texts['gan']
        assert '0.1 clipscore' in texts['reward']
        assert 'held-out' in texts['reward']
        assert 'rewarded, 1 step' in texts['reward']
        heads = saved(folder, 'gan')['disc']
        mixed = heads['heads.0.mix.weight'].shape[2:]
        assert mixed == ((3, 3) if net.grid else (9,))
        frozen = {id(p) for p in net.embedding_parameters()}
        start = teacher_of(kind, release(kind)).net.state_dict()
        trained = saved(folder, 'distill')['net']
        for name, p in net.named_parameters():
            kept = torch.equal(trained[name], start[name])
            assert kept or id(p) not in frozen, name
        assert not torch.equal(trained['blocks.0.image.qkv.q.weight'], start['blocks.0.image.qkv.q.weight'])


def test_tteo_optimises_the_start_of_a_student_of_text(tmp_path):
    for kind in KINDS:
        folder, _ = staged(kind)
        ask = f'--ckpt={folder}/reward.pt {judges(folder + "/clip")} --w_pick=0 --starts=2 --iterations=1 --n=3'
        for prompt in ('', '--prompt "a red circle"'):
            text = must_run(f'tteo.py {ask} --name={tmp_path}/{kind} {prompt}')
            assert f'recipe of --teacher={kind}' in text
            assert 'best of ' in text
            rows = json.loads(pathlib.Path(f'{tmp_path}/{kind}.json').read_text())['table']
            assert rows[1]['reward'] >= rows[0]['reward']      # the best of what it saw, the start included
            assert rows[0]['held_out'] != rows[0]['reward']


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_student_of_text_draws_any_prompt_whatever_the_batch(tmp_path):
    for kind in KINDS:
        folder, _ = staged(kind)
        ask = f'sample.py --ckpt={folder}/reward.pt --n=4 --grid={tmp_path}/x.png'
        prompt = '--prompt "two yellow stars left of a house"'
        for batch in (4, 3):
            text = must_run(f'{ask} {prompt} --batch={batch} --png_dir={tmp_path}/{kind}{batch}')
            assert '1 network pass' in text
        for k in range(4):
            one = pixels(f'{tmp_path}/{kind}4/{k:05d}.png')
            assert one.shape == (16, 16, 3)
            assert np.array_equal(one, pixels(f'{tmp_path}/{kind}3/{k:05d}.png')), (kind, k)
        must_run(f'{ask} --prompts={release(kind)}/prompts.txt --png_dir={tmp_path}/{kind}')
        lines = pathlib.Path(f'{tmp_path}/{kind}/captions.txt').read_text().splitlines()
        assert [line.split('\t')[1] for line in lines] == PICTURED[::3]
        text = must_run(f'sample.py {files_of(kind)} --steps=3 --n=2 --grid={tmp_path}/t.png --prompt "a red circle"')
        assert '6 network pass' in text


def test_scores_of_published_rewards_are_printed_for_any_captions():
    folder, _ = staged('maskgen')
    ask = f'sample.py --ckpt={folder}/distill.pt --metrics --n_metrics=6'
    text = must_run(f'{ask} --clip_path={folder}/clip --pick_path={folder}/clip')
    assert 'CLIP score: ' in text
    assert 'PickScore: ' in text


# -----------------------------------------------------------------------------
# Layouts of the benchmarks

def below(folder):
    """The files in a folder, in order."""
    found = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in found)


def drawn_twice(ask, folder, n):
    """Draw a benchmark; a second call draws nothing, and a third only what is broken -> its files."""
    text = must_run(f'{ask} --png_dir={folder}')
    assert f'{n} of them drawn now' in text
    found = below(folder)
    before = {name: pathlib.Path(folder, name).read_bytes() for name in found}
    assert '0 of them drawn now' in must_run(f'{ask} --png_dir={folder}')
    picture = pathlib.Path(folder, [name for name in found if name.endswith(('png', 'jpg'))][-1])
    picture.write_bytes(picture.read_bytes()[:-20])
    assert ' 1 of them drawn now' in must_run(f'{ask} --png_dir={folder}')
    assert {name: pathlib.Path(folder, name).read_bytes() for name in below(folder)} == before
    return found


def test_geneval_finds_four_images_and_one_object_of_metadata_a_prompt(tmp_path):
    entries = [dict(tag='single_object', include=[dict([('class', 'cat'), ('count', 1)])], prompt='a photo of a cat'),
               dict(tag='colors', include=[], prompt='a red  star'),
               dict(tag='colors', include=[], prompt='a red  star')]
    listed = tmp_path / 'evaluation_metadata.jsonl'
    listed.write_text('\n'.join(json.dumps(entry) for entry in entries) + '\n')
    for kind in KINDS:
        ask = f'sample.py --ckpt={staged(kind)[0]}/reward.pt --layout=geneval --prompts={listed} --batch=5'
        root = tmp_path / kind
        found = drawn_twice(ask, root, 12)
        wanted = []
        for k, entry in enumerate(entries):
            lines = (root / f'{k:05d}/metadata.jsonl').read_text().splitlines()
            assert [json.loads(line) for line in lines] == [entry]
            wanted += [f'{k:05d}/metadata.jsonl', *(f'{k:05d}/samples/{j:04d}.png' for j in range(4))]
        assert found == sorted(wanted)
        images = {pixels(path).tobytes() for path in root.rglob('*.png')}
        assert len(images) == 12               # a seed for each, of equal prompts too


def test_hpsv2_finds_a_folder_of_jpegs_a_style_and_nothing_else(tmp_path):
    styles = {'anime': 2, 'concept-art': 1, 'paintings': 1, 'photo': 3}
    (tmp_path / 'prompts').mkdir()
    for style, n in styles.items():
        (tmp_path / f'prompts/{style}.json').write_text(json.dumps(PICTURED[:n]))
    ask = f'sample.py --ckpt={staged("maskgen")[0]}/distill.pt --layout=hpsv2 --prompts={tmp_path}/prompts'
    found = drawn_twice(ask, tmp_path / 'images', 7)
    wanted = []
    for style, n in styles.items():
        wanted += [f'{style}/{k:05d}.jpg' for k in range(n)]
    assert found == sorted(wanted)
    assert Image.open(tmp_path / 'images/photo/00002.jpg').format == 'JPEG'


def test_mjhq_finds_an_image_by_its_id_in_its_category(tmp_path):
    entries = {'0a1b': dict(category='animals', prompt='a red star'), '2c': dict(category='food', prompt='a square')}
    listed = tmp_path / 'meta_data.json'
    listed.write_text(json.dumps(entries))
    ask = f'sample.py --ckpt={staged("meissonic")[0]}/distill.pt --layout=mjhq --prompts={listed}'
    found = drawn_twice(ask, tmp_path / 'images', 2)
    assert found == ['animals/0a1b.png', 'food/2c.png']


def test_images_of_another_seed_or_model_are_not_taken_for_these(tmp_path):
    listed = tmp_path / 'meta_data.json'
    listed.write_text(json.dumps({'2c': dict(category='food', prompt='a square')}))
    ask = (f'sample.py --ckpt={staged("maskgen")[0]}/distill.pt --layout=mjhq --prompts={listed} '
           f'--png_dir={tmp_path}/images')
    must_run(ask)
    must_refuse(f'{ask} --seed=1', words='of seed 0, not 1')


def test_a_wrong_benchmark_file_is_one_line(tmp_path):
    listed = tmp_path / 'meta_data.json'
    for layout in ('geneval', 'mjhq'):
        with exits_with(tmp_path, 'is a folder'):
            read_jobs(layout, tmp_path)
        for text in (b'\xff', b'[' * 100_000, b'{"prompt": " "}', b'{"1": {"prompt": ""}}'):
            listed.write_bytes(text)
            with exits_with(listed):
                read_jobs(layout, listed)


# -----------------------------------------------------------------------------
# The same bits after an interruption, the same numbers on two processes; published sizes

STEPS_OF = {'distill': 2, 'gan': 3, 'reward': 2}       # optimizers that an update calls, one for each network


def continued(stage, folder, command, chosen):
    """A run that is killed in an update after the first save, and continued -> its checkpoint."""
    saved_after = 2 * STEPS_OF[stage]
    if stage == 'gan':
        saved_after += 1                       # its heads have warmed up
    nth = saved_after + chosen.randint(1, 2 * STEPS_OF[stage])
    deadly = KILL.format(call='torch.optim.AdamW.step', nth=nth, signal='SIGKILL')
    code, text = run(f'{stage}.py --out_dir={folder} {command}', before=deadly)
    assert code == -signal.SIGKILL, text[-1500:]
    assert saved(folder, stage)['step'] == 2
    must_run(f'{stage}.py --out_dir={folder} {command} --resume')
    return saved(folder, stage)


def test_a_run_on_text_that_was_killed_and_resumed_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    for kind in KINDS:
        whole, _ = staged(kind)
        commands = stages_from(whole, files_of(kind))
        for stage, command in commands.items():
            state = continued(stage, f'{tmp_path}/{kind}', command, random.Random(f'{kind} {stage}'))
            same({**state, 'config': 0}, {**saved(whole, stage), 'config': 0})


def first_moments(folder, command, processes):
    """What Adam holds after one step of distillation: a tenth of the averaged, clipped gradient."""
    must_run(f'distill.py --out_dir={folder} {command} --steps=1', processes=processes)
    found = []
    for optimizer in saved(folder, 'distill')['optimizers']:
        for kept in optimizer['state'].values():
            found.append(kept['exp_avg'])
    return found


def test_two_processes_give_the_gradient_of_one_on_text(tmp_path):
    for kind in KINDS:
        command = f'{files_of(kind)} {SHORT} --cfg_scale=1.5'
        one = first_moments(f'{tmp_path}/{kind}1', command, 1)
        two = first_moments(f'{tmp_path}/{kind}2', command, 2)
        largest = max(float(x.abs().max()) for x in one)
        assert len(one) > 10
        for a, b in zip(one, two, strict=True):
            assert (a - b).abs().max() < 1e-4 * largest, kind


SMALL_SIZES = """
from common import maskgen, meissonic
sizes = dict(N=8, V=16, D=32, depth=2, n_head=2, C=24, micro=8)
maskgen.SIZES['random'].update(sizes)
sizes = dict(image_size=16, patch=4, N=8, V=16, code_dim=6, width=(24, 32), depth=(1, 1), n_head=(2, 2), C=24)
maskgen.TATITOK_SIZE.update(sizes)
sizes = dict(V=16, D=32, n_joint=1, n_single=1, n_head=2, grid=4, C=24, axes=(4, 6, 6))
meissonic.SIZE.update(sizes)
sizes = dict(image_size=16, ch=32, ch_mult='1,1,1', n_res=1, n_codes=16, code_dim=5, mid=1, up=1, z=6, stem=32)
meissonic.VQ_SIZE.update(sizes)
from common import rewards
rewards.STAND_IN.update(width=32, depth=2, n_head=2, patch=56)
"""
STAND_IN = '--w_clipscore=1 --clip_path=random --w_clip=0 --w_hps=0 --w_imagereward=0 --held_out=none'


def test_the_published_sizes_of_text_teachers_are_timed_without_any_file():
    for kind in KINDS:
        ask = f'--bench --teacher={kind} --teacher_path=random'
        for script in ('distill.py', 'gan.py'):
            text = must_run(f'{script} {ask} --batch_size=2 --micro_batch=1', before=SMALL_SIZES)
            assert 'ms_per_step' in text
        switch = '--grad_checkpoint --half_decoder=false' if kind == 'maskgen' else ''
        for command in (f'reward.py {ask} --batch_size=2', f'tteo.py --bench --teacher={kind} --ckpt=random --w_pick=0 --batch=2'):
            text = must_run(f'{command} {STAND_IN} {switch}', before=SMALL_SIZES)
            assert 'ms_per_step' in text
        text = must_run(f'sample.py {ask} --steps=4 --batch=3', before=SMALL_SIZES)
        assert 'steps 4, passes 8, batch 3, images_per_s' in text
