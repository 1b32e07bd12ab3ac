"""
The claims of this repository, as tests: plain functions, on a CPU (one needs a GPU), with tiny networks, in a few
minutes. The paper's equations come first, in the order of the method: each is a small example of use, against an oracle
(autograd in float64, a sum over all cases, scipy). Then whole runs of every script, and the repository itself. The
tests of the helpers (common/test_common.py), of data and published files (test_data.py) and of text to image
(test_text.py) run by the same command.

$ python test_all.py                 # all of them, ends with "N passed, M failed, K skipped"
$ python test_all.py equations       # the first part alone, in seconds
$ python test_all.py resume soft     # those with one of these words in their name
$ pytest test_all.py common/test_*.py            # the same, if you have pytest
Set GOLDEN to a folder of golden files to compare with published layouts; such tests skip where it is unset.
"""
import ast
import contextlib
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest import SkipTest, mock

import numpy as np
import scipy.stats

from common.testing import (HERE, KILL, ON_GPU, PRECISION, SCRIPTS, TRACED, UNTRAINED, capture, collected,
                            exits_with, layouts, mini, mini_tokenizer, must_refuse, must_run, near,
                            network_of, published, ready_for, rng, run, run_tests, same,
                            small_model, small_tokenizer, tiny_run)
import torch
import torch.nn.functional as F
from PIL import Image

import distill
import gan
import model as M
import reward
import sample
import tokenizer as T
import tteo
from common import run as common_run
from common import timing
from common.images import captions_of, open_data, word_ids
from common.metrics import Reference
from common.rewards import TwoTower, world_reward
from common.run import cosine_law, image_rngs, micro_rng, rate_law, rng_for
from common.teachers import word_teacher
from common.world import HELD_OUT, TASKS, WORDS, draw


# -----------------------------------------------------------------------------
# What the networks of the tests read

def some_tokens(B):
    """Tokens of `small_model` (B, 16), at random."""
    return torch.randint(12, (B, 16))


def some_cond(B):
    """Captions for it (B, 3), at random."""
    return torch.randint(5, (B, 3))


# -----------------------------------------------------------------------------
# The tokenizer

def test_quantisation_takes_the_nearest_code_and_passes_the_decoder_gradient_straight_through():
    tokenizer = small_tokenizer()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    y, z, q = tokenizer(images)
    brute = torch.cdist(z, tokenizer.codebook.weight[None]).argmin(-1)
    assert torch.equal(tokenizer.encode(images), brute)
    assert torch.equal(q, tokenizer.codebook(brute))
    at_q = q.detach().requires_grad_()
    decoded = tokenizer.decode_latents(at_q)
    assert torch.allclose(y, decoded, atol=1e-5)
    passed, = torch.autograd.grad(y.square().sum(), z)
    expected, = torch.autograd.grad(decoded.square().sum(), at_q)
    assert torch.allclose(passed, expected, atol=1e-4)
    assert expected.abs().max() > 0.01


def test_a_new_codebook_has_codes_for_rare_patches():
    place = torch.cat([torch.zeros(501), torch.tensor([0.0, 9.0, -9.0])])  # two patches are rare
    z = place[:, None] + 1e-3 * torch.randn(504, 1)
    nothing = z[:0]
    middle = z[:1]
    middle_and_right = z[[0, -2]]
    for seed in range(20):
        def new(n, taken, near=0.0):
            return {round(v) for v in T.spread_out(z, n, rng(seed), taken, near)[:, 0].tolist()}
        assert new(3, nothing) == {0, 9, -9}
        assert new(2, middle) == {9, -9}
        assert new(1, middle_and_right, near=1.0) == {-9}


# -----------------------------------------------------------------------------
# Transformer and soft embedding

def test_a_decoder_in_bf16_draws_nearly_the_same_and_passes_nearly_the_same_gradient():
    tokenizer = small_tokenizer().requires_grad_(False)
    logits = torch.randn(3, 16, 12)
    found = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        decoder = tokenizer.decoder_in(dtype) if dtype else tokenizer
        z = logits.clone().requires_grad_()
        images = decoder.decode(z.softmax(-1))
        images.square().sum().backward()
        assert images.dtype == torch.float32
        found[dtype] = images.detach(), z.grad
        assert (decoder.decode(logits.argmax(-1)) - tokenizer.decode(logits.argmax(-1))).abs().max() < 0.05
    images, grad = found[None]
    for dtype, tolerance, alike in ((torch.float32, 1e-5, 0.999999), (torch.bfloat16, 0.05, 0.99)):
        assert (found[dtype][0] - images).abs().max() < tolerance
        assert F.cosine_similarity(found[dtype][1].flatten(1), grad.flatten(1)).min() > alike
    assert tokenizer.decoder.conv_in.weight.dtype == torch.float32


def test_recomputed_blocks_keep_less_and_give_the_same_gradient():
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x
    found = {}
    for recomputed in (False, True):
        loaded = small_teacher(small_model())
        loaded.choose_decoder(SimpleNamespace(fast_dtype=torch.float32), True, recomputed)
        assert not any('forward' in vars(m) for m in loaded.tokenizer.modules())       # a copy is changed
        z = torch.linspace(-2, 2, 3 * 16 * 12).view(3, 16, 12).sin().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            images = loaded.decoder.decode(z.softmax(-1))
        images.square().sum().backward()
        found[recomputed] = sum(kept), z.grad
    assert found[True][0] < 0.5 * found[False][0]
    assert torch.equal(found[True][1], found[False][1])


def test_one_hot_is_bitwise_the_hard_path_in_every_layout():
    for model, tokenizer in layouts():
        ids = torch.randint(model.V, (3, model.N))
        mask = torch.rand(3, model.N) < 0.5
        one_hot = F.one_hot(ids, model.V).float()
        for hidden in (None, mask):
            hard = model.embed(ids, hidden)
            assert hard.shape == (3, model.L, model.D)
            for kind in (torch.float32, torch.bfloat16, torch.float64):
                assert torch.equal(hard, model.embed(one_hot.to(kind), hidden))
        assert torch.equal(hard, model.embed(ids.masked_fill(mask, model.mask_id)))
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(model.embed(ids, mask), model.embed(one_hot, mask))
        images = tokenizer.decode(ids)
        assert torch.equal(images, tokenizer.decode(one_hot))
        assert images.shape == (3, 3, 16, 16)
        assert tokenizer.encode(images).shape == (3, model.N)
        with exits_with(f'expects ids (B, {model.N}), got (3, 9)'):
            model.embed(ids[:, :9])
        with exits_with(f'expects probabilities (B, {model.N}, {model.V})'):
            model.embed(one_hot[..., 1:])
        with exits_with(f'(B, {model.N}, {model.V})'):
            tokenizer.decode(one_hot[..., 1:])


def test_soft_embedding_is_the_expectation():
    model = small_model().double()
    probs = torch.randn(2, 16, 12, dtype=torch.float64).softmax(-1)
    expectation = 0
    for v in range(12):  # E[e] = sum_v p_v e_v
        e_v = model.embed(torch.full((2, 16), v))
        expectation = expectation + probs[..., v:v + 1] * e_v
    assert torch.allclose(model.embed(probs), expectation, atol=1e-12)
    maskbit = mini('maskbit')
    assert maskbit.codes[3].tolist() == [1, 1, -1]
    assert (maskbit.codes[8] == 0).all()
    probs = torch.randn(3, 32, 8).softmax(-1)
    bits = (probs @ maskbit.codes[:8]).view(3, 16, 6)  # MaskBit's: of the expected bits
    assert torch.allclose(maskbit.embed(probs), maskbit.input_proj(bits))


def test_gradients_of_probabilities_match_finite_differences_in_every_layout():
    for model, tokenizer in layouts():
        model.double()
        probs = torch.randn(1, model.N, model.V, dtype=torch.float64).softmax(-1).requires_grad_()
        cond = torch.zeros(1, model.config['T']).long()

        def logits_of(p):
            return model(p, cond)
        assert torch.autograd.gradcheck(tokenizer.double().decode, probs, fast_mode=True)
        assert torch.autograd.gradcheck(logits_of, probs, fast_mode=True)


def test_forward_takes_ids_probabilities_and_embeddings():
    alike = [small_model(D=12), mini('maskgit', V=32, D=32),  # probabilities and embeddings of
             mini('maskbit', N=16, V=16, bits=4, S=1, D=16)]  # one shape: told apart by their sums
    for model in (small_model(), mini('maskbit'), *alike):
        ids = torch.randint(model.V, (2, model.N))
        cond = torch.randint(5, (2, model.config['T']))
        logits = model(ids, cond)
        assert logits.shape == (2, model.N, model.V)
        assert torch.equal(logits, model(model.embed(ids), cond))
        assert torch.equal(logits, model(F.one_hot(ids, model.V).float(), cond))
        below = F.one_hot(ids, model.V) - 1e-6  # as finite differences step
        assert torch.allclose(logits, model(below, cond), atol=1e-3)
        assert not torch.allclose(logits, model(ids, model.null(cond)))


def test_features_are_the_states_behind_the_blocks_asked_for():
    model = small_model()
    emb = torch.randn(2, 16, 24)
    cond = some_cond(2)
    states = model.features(emb, cond, [1, 2])
    assert [tuple(h.shape) for h in states] == [(2, 16, 24)] * 2
    h = model.first(torch.cat([emb, model.cond_emb(cond)], 1) + model.pos_emb)
    for block, state in zip(model.blocks, states, strict=True):
        h = block(h)
        assert torch.equal(h[:, :16], state)
    same(states[::-1], model.features(emb, cond, [2, 1]))
    for layers in ([0, 3], []):
        with exits_with('some of the blocks 1 to 2'):
            model.features(emb, cond, layers)


def test_conditions_are_pooled_dropped_and_joined_and_positions_know_their_grid():
    model = small_model()
    cond = some_cond(2)
    assert torch.equal(model.pooled(cond), model.cond_emb(cond).flatten(1))
    assert model.null(cond).eq(5).all()
    assert model.null(cond).shape == cond.shape
    assert (model.grid, small_model(N=12).grid) == ((4, 4), None)
    assert torch.equal(M.both(cond, cond + 1), torch.cat([cond, cond + 1]))
    assert M.batch_of(cond) == 2
    joined = M.both((cond, cond[:, 0]), (cond, cond[:, 1]))
    assert [len(part) for part in joined] == [4, 4]
    assert M.batch_of(joined) == 4


def test_blocks_equal_torchs_encoder_layers_with_norms_before_and_after():
    x = torch.randn(2, 7, 24)
    for post_norm in (False, True):
        ours = M.Block(24, 2, 48, post_norm, 1e-3)
        theirs = torch.nn.TransformerEncoderLayer(24, 2, 48, 0, 'gelu', 1e-3, batch_first=True,
                                                  norm_first=not post_norm)
        weights = [p.data.normal_(std=0.2) for p in ours.parameters()]
        weights = weights[4:] + weights[:4]  # torch has its norms last
        theirs.load_state_dict(dict(zip(theirs.state_dict(), weights, strict=True)))
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


# -----------------------------------------------------------------------------
# Masking, token initialisation

def test_attention_is_the_softmax_average_in_bf16_too():
    q, k, v = torch.randn(3, 2, 3, 20, 8, dtype=torch.float64)
    weights = torch.exp(q @ k.transpose(-2, -1) / 8 ** 0.5)
    wanted = weights @ v / weights.sum(-1, keepdim=True)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        found = M.attend(q.to(dtype), k.to(dtype), v.to(dtype))
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() < tolerance


def test_mask_ratio_follows_its_law():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.allclose(torch.cos(M.mask_ratio(u) * math.pi / 2), u)
    assert M.mask_ratio(u)[0] == 1
    assert torch.allclose(M.mask_ratio(u, 'cosine'), torch.cos(math.pi * u / 2))
    with exits_with("'linear'", 'arccos or cosine'):
        M.mask_ratio(u, 'linear')


def test_masking_hits_the_exact_count_uniformly():
    tokens = torch.zeros(4000, 16).long()
    ratio = torch.rand(4000)
    mask = M.mask_tokens(tokens, ratio)
    assert torch.equal(mask.sum(1), (ratio * 16).round().clamp(min=1).long())
    assert mask.dtype == torch.bool
    assert M.mask_tokens(tokens, torch.zeros(4000)).sum(1).eq(1).all()
    assert M.mask_tokens(tokens, torch.ones(4000)).all()
    assert M.mask_tokens(torch.zeros(1, 512), torch.tensor([0.75]).bfloat16()).sum() == 384
    share = M.mask_tokens(tokens, torch.full((4000,), 0.25)).float().mean(0)
    assert (share - 0.25).abs().max() < 0.04


def test_remasking_hides_masked_tokens_only():
    tokens = some_tokens(200)
    x_t, mask = M.remask(tokens, 12, 'arccos', rng(0))
    assert (x_t[mask] == 12).all()
    assert torch.equal(x_t[~mask], tokens[~mask])
    assert 0.5 < mask.float().mean() < 0.8  # 2 / pi on average
    assert M.remask(tokens, 12, 'arccos', None, p_full=1.0)[1].all()
    tokens = torch.randint(12, (400, 32))
    _, mask = M.remask(tokens, 12, 'arccos', rng(0), p_near=1.0)
    shown = (~mask).sum(1)
    assert set(shown.tolist()) == {1, 2, 3, 4}
    assert shown.bincount()[1:].min() > 75  # 1 to 32 / 8
    _, mask = M.remask(tokens, 12, 'arccos', rng(0), p_full=0.5, p_near=0.5)
    assert 150 < mask.all(1).sum() < 250
    assert (mask.sum(1) >= 28).all()


def test_token_initialisation_is_exact_and_uniform():
    x = M.init_tokens(2000, 16, 12, 0.6, rng(0))
    assert (x == 12).sum(1).eq(round(0.6 * 16)).all()
    assert x.shape == (2000, 16)
    counts = torch.bincount(x[x < 12], minlength=12)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert (M.init_tokens(5, 16, 12, 0.0) < 12).all()
    assert (M.init_tokens(5, 16, 12, 1.0) == 12).all()


def test_noise_has_the_stated_variance_and_enters_behind_the_embedding():
    emb = torch.randn(1, 4096, 24)
    noise = M.add_noise(emb, 0.6, rng(0)) - 0.8 * emb  # sqrt(1 - .6^2) = .8
    assert abs(noise.std() - 0.6) < 0.01
    assert abs(noise.mean()) < 0.01
    assert torch.equal(M.add_noise(emb, 0.0), emb)
    model = small_model()
    ids = some_tokens(2)
    cond = some_cond(2)
    noisy = M.add_noise(model.embed(ids), 0.6, rng(0))
    assert torch.equal(model(ids, cond, 0.6, rng(0)), model(noisy, cond))


def test_the_generator_starts_from_the_embedded_initial_tokens_and_noise():
    model = small_model()
    numbers = rng(1)
    x_init = M.init_tokens(3, 16, 12, 0.6, numbers)
    start = M.add_noise(model.embed(x_init), 0.3, numbers)
    assert torch.equal(M.start_embedding(model, 3, 0.6, 0.3, rng(1)), start)
    plain = M.start_embedding(model, 3, 0.6, 0.0, rng(1))
    assert torch.equal(plain, model.embed(x_init))
    masked = (plain == model.embed(torch.full((3, 16), 12))).all(-1)
    assert masked.sum(1).eq(round(0.6 * 16)).all()


# -----------------------------------------------------------------------------
# Sampling

def test_categorical_draws_have_the_right_frequencies():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3]).expand(200, 200, 4)
    counts = torch.bincount(M.categorical(probs, rng(0)).flatten(), minlength=4)
    assert counts[1] == 0
    assert scipy.stats.chisquare(counts[[0, 2, 3]].numpy(), [20000, 8000, 12000]).pvalue > 1e-4


def test_tokens_are_drawn_from_the_softmax_at_its_temperature():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = p.log().expand(200, 200, 4).requires_grad_()
    tokens = M.draw_tokens(logits, 0.5, rng(0))  # softmax(z / .5) = p^2 / sum p^2
    counts = torch.bincount(tokens.flatten(), minlength=4).numpy()
    expected = 40000 * np.array([16, 9, 4, 1]) / 30
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-4
    assert M.draw_tokens(logits, top_k=1).eq(0).all()
    assert M.draw_tokens(logits, top_p=0.6).max() == 1
    assert not tokens.requires_grad


def test_top_k_and_top_p_keep_the_likeliest():
    probs = torch.tensor([[[0.1, 0.5, 0.15, 0.25]]])
    assert (M.filter_probs(probs, top_k=2) > 0).tolist() == [[[False, True, False, True]]]
    assert (M.filter_probs(probs, top_p=0.7) > 0).tolist() == [[[False, True, False, True]]]
    assert (M.filter_probs(probs, top_p=0.4) > 0).sum() == 1
    assert torch.equal(M.filter_probs(probs), probs)


def test_guidance_is_u_plus_s_times_c_minus_u():
    model = small_model()
    ids = some_tokens(2)
    cond = some_cond(2)
    c = model(ids, cond)
    u = model(ids, model.null(cond))
    for s in (0.0, 1.0, 2.5):
        assert torch.allclose(M.guided_logits(model, ids, cond, s), u + s * (c - u), atol=1e-5)


def recorded(model, logits=None):
    """The inputs that a network gets from now on, a list that grows. Where there are `logits`, it
    answers with these."""
    seen = []
    real = model.forward

    def forward(x, cond):
        seen.append(x.clone())
        if logits is not None:
            return logits.expand(len(x), -1, -1)
        return real(x, cond)
    model.forward = forward
    return seen


def test_teacher_sampler_reveals_by_its_plan_and_keeps_what_it_revealed():
    cases = [('ours', 1), ('ours', 2), ('ours', 5), ('ours', 16), ('maskbit', 6)]
    for kind, steps in cases:
        model = small_model() if kind == 'ours' else mini(kind)
        counts = M.sampling_plan(steps, model.N, model.law).counts
        assert len(counts) == steps
        assert sum(counts) == model.N
        assert min(counts) >= 1
        seen = recorded(model)
        cond = torch.randint(5, (6, model.config['T']))
        tokens = M.sample_teacher(model, cond, steps, cfg_scale=1.0)
        assert ((tokens >= 0) & (tokens < model.V)).all()
        assert len(seen) == steps
        for k, x in enumerate(seen):
            shown = x != model.mask_id
            assert shown.sum(1).eq(sum(counts[:k])).all()
            assert torch.equal(x[shown], tokens[shown])
    assert M.reveal_counts(8, 256) == [1, 18, 26, 32, 38, 43, 48, 50]  # the published MaskGIT table
    with exits_with('1..16', '17'):
        M.reveal_counts(17, 16)


def test_teacher_sampler_reveals_the_most_confident_first_and_noise_in_proportion():
    model = small_model(N=12)
    place = torch.arange(12)
    flat = torch.zeros(12, 12).masked_fill(place > place[:, None], -1e9)  # place i: i + 1 codes, equally likely
    seen = recorded(model, flat)
    M.sample_teacher(model, torch.zeros(2, 3).long(), 12, 1.0, gumbel=0.0)
    for k, x in enumerate(seen):
        assert torch.equal(x != 12, (place < k).expand(2, -1))
    seen.clear()
    M.sample_teacher(model, torch.zeros(4000, 3).long(), 2, 1.0, gumbel=1.0)
    law = 1 / (1 + place) / (1 / (1 + place)).sum()  # Gumbel's maximum: in proportion to p
    assert ((seen[1] != 12).float().mean(0) - law).abs().max() < 0.03
    assert len(seen) == 2


def test_maskbit_guidance_follows_its_plan_and_its_passes_are_counted():
    model = mini('maskbit')
    with mock.patch.object(M, 'guided_logits', wraps=M.guided_logits) as guided:
        tokens = M.sample_teacher(model, torch.zeros(2, 1).long(), 6, cfg_scale=8.1, gumbel=7.8)
    used = [call.args[3] for call in guided.call_args_list]
    assert ((tokens >= 0) & (tokens < 8)).all()
    assert len(used) == 6
    assert used[0] == 1
    assert np.allclose(used, 1 + 7.1 * np.array(M.sampling_plan(6, model.N, 'maskbit').guidance))
    assert M.teacher_passes(model, 6, 8.1) == 6 + sum(s != 1 for s in used)
    assert M.teacher_passes(model, 6, 1.0) == 6
    shares = M.sampling_plan(64, 512, 'maskbit').guidance  # 0 in float32 at steps 1 to 3
    assert sum(1 + (s != 0) for s in shares) == 125
    with exits_with("'cosine'", 'maskgit or maskbit'):
        M.sampling_plan(6, 32, 'cosine')


def test_the_samplers_of_pictures_and_tables_are_the_teachers_and_the_one_step_generators():
    model = small_model()
    cond = some_cond(4)
    teacher = M.teacher_sampler(model, 4, 1.5, 8.0)
    student = M.student_sampler(model, 0.6, 0.3, 0.5, top_k=3)
    tokens = M.sample_teacher(model, cond, 4, 1.5, 8.0, rng=rng(0))
    assert torch.equal(teacher(cond, rng(0)), tokens)
    logits, tokens = M.one_step(model, cond, 0.6, 0.3, 0.5, rng(0), top_k=3)
    assert torch.equal(student(cond, rng(0)), tokens)
    numbers = rng(0)  # one_step is three functions
    emb = M.start_embedding(model, 4, 0.6, 0.3, numbers)
    assert torch.equal(logits, model(emb, cond))
    assert torch.equal(tokens, M.draw_tokens(logits, 0.5, numbers, top_k=3))


def test_an_image_does_not_depend_on_its_batch():
    model = small_model()
    cond = some_cond(7)
    student = M.student_sampler(model, 0.6, 0.3, 1.0)
    teacher = M.teacher_sampler(model, 4, 1.5, 8.0)
    for draw_images in (student, teacher):
        whole = draw_images(cond, image_rngs(0, range(7)))
        for k in range(0, 7, 2):
            part = draw_images(cond[k:k + 2], image_rngs(0, range(k, min(k + 2, 7))))
            assert torch.equal(whole[k:k + 2], part)
        assert not torch.equal(whole, draw_images(cond, image_rngs(1, range(7))))


def test_every_seed_step_and_part_has_random_numbers_of_its_own():
    keys = [(0, 0), (1, 0), (0, 1), (0, 0, 1), (0, 0, 'x')]
    numbers = {torch.rand(1, generator=rng_for(*key)).item() for key in keys}
    assert len(numbers) == 5


# -----------------------------------------------------------------------------
# Relaxations

def test_relaxations_are_probabilities_with_the_softmax_gradient():
    logits = torch.randn(4, 5, 7, requires_grad=True)
    weight = torch.randn(4, 5, 7)
    soft = M.relaxed(logits, 'soft', 0.7)
    assert torch.equal(soft, (logits / 0.7).softmax(-1))
    soft_grad, = torch.autograd.grad((soft * weight).sum(), logits)
    for kind in ('gumbel', 'st'):
        x = M.relaxed(logits, kind, 0.7, rng(1))
        assert torch.equal(x, F.one_hot(x.argmax(-1), 7).float())  # exactly one-hot
        grad, = torch.autograd.grad((x * weight).sum(), logits)
        assert (grad != 0).all()
    assert torch.allclose(grad, soft_grad)  # that of st
    one = logits[:1, :1].detach()
    draws = M.relaxed(one.expand(4000, 1, 7), 'gumbel', 1.0, rng(0)).argmax(-1)
    share = torch.bincount(draws.flatten(), minlength=7) / 4000
    assert (share - one.softmax(-1)).abs().max() < 5 * (0.25 / 4000) ** 0.5  # Gumbel-max draws from the softmax
    with exits_with('unknown relaxation', 'soft, gumbel or st'):
        M.relaxed(logits, 'hard')


def test_bias_of_soft_embeddings_obeys_its_bound():
    table = torch.randn(12, 3, dtype=torch.float64)
    probs = torch.randn(5, 2, 12, dtype=torch.float64).softmax(-1)

    def square(e):  # Lip = 2: bias = tr Cov(e) exactly
        return e.square().sum((1, 2))[:, None]
    bias, bound, trace = M.relaxation_bias(square, probs, table, rng(0), 4000)
    distance = (table - (probs @ table)[:, :, None]).square().sum(-1)  # |e_v - E[e]|^2, (B, N, V)
    brute = (probs * distance).sum((1, 2))
    assert torch.allclose(trace, brute)
    assert torch.allclose(bound, trace)
    assert torch.allclose(bias, trace, rtol=0.1)

    def linear(e):
        return e.flatten(1) @ torch.ones(6, 2).double()
    bias, _, _ = M.relaxation_bias(linear, probs, table, rng(0))
    assert bias.abs().max() < 1e-9
    model = small_model()
    cond = torch.zeros(5, 3, dtype=torch.long)

    def first_block(e):
        return model.features(e, cond, [1])[0]
    soft = torch.randn(5, 16, 12).softmax(-1)
    bias, bound, _ = M.relaxation_bias(first_block, soft, model.tok_emb.weight[:12], rng(0))
    assert (0 < bias).all()
    assert (bias <= bound).all()


# -----------------------------------------------------------------------------
# Di[M]O: the divergence and its losses

def test_divergence_is_the_two_kls_at_beta_0_and_1_and_its_gradient_equals_autograd():
    numbers = rng(0)
    teacher = 2 * torch.randn(3, 5, 7, generator=numbers, dtype=torch.float64)
    aux = 2 * torch.randn(3, 5, 7, generator=numbers, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=numbers) < 0.6
    p = teacher.softmax(-1).numpy()
    q = aux.softmax(-1).numpy()
    forward = scipy.stats.entropy(p, q, axis=-1)  # KL(teacher || aux)
    reverse = scipy.stats.entropy(q, p, axis=-1)
    for beta in (-0.2, 0.0, 0.5, 1.0, 1.7):
        expected = ((1 - beta) * forward + beta * reverse) * mask.numpy()
        expected = torch.from_numpy(expected).sum(-1)
        assert torch.allclose(M.jeffreys(teacher, aux, mask, beta), expected)
        z = aux.clone().requires_grad_()
        auto, = torch.autograd.grad(M.jeffreys(teacher, z, mask, beta).sum(), z)
        closed = M.dimo_grad(teacher, aux, mask, beta)
        assert torch.allclose(closed, auto, atol=1e-12)
        assert (closed[~mask] == 0).all()


def test_large_logits_are_judged_image_by_image_with_the_same_result():
    teacher, aux = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.rand(3, 5) < 0.6
    whole = M.dimo_grad(teacher, aux, mask, 0.3), M.jeffreys(teacher, aux, mask, 0.3)
    with mock.patch.object(M, 'LARGE', 35):
        parts = M.dimo_grad(teacher, aux, mask, 0.3), M.jeffreys(teacher, aux, mask, 0.3)
    same(parts, whole)


def test_a_large_auxiliary_loss_is_summed_image_by_image_with_the_same_gradient():
    logits = torch.randn(3, 16, 12, dtype=torch.float64, requires_grad=True)
    tokens = some_tokens(3)
    mask = M.mask_tokens(tokens, torch.tensor([0.1, 0.5, 1.0]))            # unequal weights
    whole = M.aux_loss(logits, tokens, mask, 0.1)
    with mock.patch.object(M, 'LARGE', 16 * 12):
        parts = M.aux_loss(logits, tokens, mask, 0.1)
        gradient, = torch.autograd.grad(parts, logits)
    assert torch.isclose(parts, whole)
    assert torch.allclose(gradient, torch.autograd.grad(whole, logits)[0], atol=1e-7)    # the loss is float32


def test_surrogate_hands_its_gradient_to_the_logits():
    logits = torch.randn(4, 5, 7, requires_grad=True)
    grad = torch.randn(4, 5, 7)
    M.surrogate(logits, grad).backward()
    assert torch.allclose(logits.grad, grad / 4)


def test_auxiliary_loss_counts_masked_positions_only():
    logits = torch.randn(2, 16, 12, requires_grad=True)
    tokens = some_tokens(2)
    mask = M.mask_tokens(tokens, torch.tensor([0.3, 0.7]))
    loss = M.aux_loss(logits, tokens, mask, 0.0)
    log_p = logits.log_softmax(-1)
    of_tokens = log_p.gather(-1, tokens[..., None])[..., 0]  # (B, N)
    brute = -(of_tokens * mask).sum() / mask.sum()
    assert torch.allclose(loss, brute)
    smooth = 0.9 * loss - 0.1 * log_p[mask].mean()
    assert torch.allclose(M.aux_loss(logits, tokens, mask, 0.1), smooth)
    loss.backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).all()


def test_entropy_and_largest_probability_say_how_peaked_the_generator_is():
    entropy, top = M.token_entropy(torch.zeros(2, 5, 8))
    assert abs(entropy - math.log(8)) < 1e-5
    assert abs(top - 1 / 8) < 1e-6


# -----------------------------------------------------------------------------
# Di[M]O: a step, as the three stages take it

STAGES = (distill, gan, reward)
ON_CPU = torch.device('cpu')


def networks(dtype=torch.float32):
    """What a stage holds: a frozen teacher, and three networks that have moved away from it."""
    nets = SimpleNamespace(teacher=small_model().to(dtype).requires_grad_(False))
    for seed, name in enumerate(('generator', 'generator_ema', 'aux')):
        network = small_model().to(dtype)
        for p in network.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=rng(seed), dtype=dtype)
        setattr(nets, name, network)
    return nets


def one_process(micro=4, accumulate=1):
    """One process on the CPU in float32."""
    return SimpleNamespace(rank=0, world=1, device=ON_CPU, micro=micro, accumulate=accumulate,
                           autocast=contextlib.nullcontext())


def darkness(images, prompts):
    """A toy reward: dark, the more so the longer the prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return -lengths * images.mean((1, 2, 3))


def contrast(images, prompts):
    return images.square().mean((1, 2, 3))


TOY_REWARDS = dict(darkness=(2.0, darkness), contrast=(0.5, contrast))


class RealTokens:
    """Real images' tokens with a caption each, drawn as TokenData draws them."""
    def draw(self, run, rng):
        tokens = torch.randint(5, (run.micro, 16), generator=rng)
        words = torch.randint(5, (run.micro, 3), generator=rng)
        return tokens, [' '.join('abcde'[i] for i in row) for row in words]


def small_teacher(net):
    """A teacher of captions of three of five words, and what surrounds it: real images and rewards
    too."""
    prompt_ids = torch.tensor(list(itertools.product(range(5), repeat=3)))
    tokenizer = small_tokenizer().requires_grad_(False)
    loaded = word_teacher('ours', net, tokenizer, list('abcde'), prompt_ids, '', {}, ON_CPU)
    loaded.real = RealTokens()
    loaded.rewards = TOY_REWARDS
    return loaded


def resting(*names_of, nets):
    """Optimizers of rate zero: the gradients of a step stay where they are, to be looked at."""
    optimizers = {}
    for name in names_of:
        optimizer = torch.optim.SGD(getattr(nets, name).parameters(), lr=0.0)
        optimizer.peak = 0.0
        optimizers[name] = [optimizer]
    return optimizers


def gradients(network):
    """All of them, as one vector; zeros where there is none."""
    parts = []
    for p in network.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        parts.append(grad.flatten())
    return torch.cat(parts)


def untouched(network):
    """No gradient has reached it."""
    return bool(gradients(network).eq(0).all())


def test_what_the_stages_share_stands_there_word_for_word():
    for name in ('dimo_gradient', 'divergence'):
        texts = {inspect.getsource(getattr(stage, name)) for stage in STAGES}
        assert len(texts) == 1, name
    assert inspect.getsource(gan.handed_on) == inspect.getsource(reward.handed_on)


def test_dimo_gradient_is_autograds_of_the_divergence_from_the_guided_teacher():
    nets = networks(torch.float64)
    cond = some_cond(3)
    x_t, mask = M.remask(some_tokens(3), 12, 'arccos', rng(0))
    c = nets.teacher(x_t, cond)
    u = nets.teacher(x_t, nets.teacher.null(cond))
    for stage in STAGES:
        for beta, s in ((-0.2, 2.0), (0.1, 1.0), (1.0, 3.5)):
            with mock.patch.multiple(stage, beta=beta, cfg_scale=s):
                grad, aux_logits = stage.dimo_gradient(nets, x_t, mask, cond)
                per_token = stage.divergence(nets, x_t, mask, cond)
            z = aux_logits.detach().requires_grad_()
            total = M.jeffreys(u + s * (c - u), z, mask, beta).sum()
            auto, = torch.autograd.grad(total, z)
            assert torch.allclose(grad, auto, atol=1e-10)
            assert not grad.requires_grad
            assert torch.allclose(per_token, total / mask.sum())


def test_the_auxiliary_loss_learns_from_the_pass_that_the_divergence_took():
    nets = networks()
    cond = some_cond(3)
    tokens = some_tokens(3)
    x_t, mask = M.remask(tokens, 12, 'arccos', rng(0))
    with mock.patch.object(nets.aux, 'forward', wraps=nets.aux.forward) as passes:
        _, aux_logits = distill.dimo_gradient(nets, x_t, mask, cond)
    assert passes.call_count == 1
    M.aux_loss(aux_logits, tokens, mask).backward()
    found = gradients(nets.aux)
    nets.aux.zero_grad()
    M.aux_loss(nets.aux(x_t, cond), tokens, mask).backward()
    assert torch.equal(found, gradients(nets.aux))
    assert found.norm() > 0.01


def test_gradients_flow_from_one_step_to_the_generator_only():
    nets = networks()
    cond = some_cond(4)
    logits, tokens = M.one_step(nets.generator, cond, 0.6, 0.3)
    x_t, mask = M.remask(tokens, 12, 'arccos', None)
    grad, _ = distill.dimo_gradient(nets, x_t, mask, cond)
    M.surrogate(logits, grad).backward()
    for p in nets.generator.parameters():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()
    assert untouched(nets.teacher)
    assert untouched(nets.aux)
    assert not tokens.requires_grad


def dimo_step(nets, loaded, process, step, k, draw=''):
    """One micro-batch of stage 1, by hand -> surrogate, auxiliary loss."""
    numbers = micro_rng(distill.seed, step, k, process, draw)
    cond, logits, tokens = distill.draw_batch(nets, loaded, process, numbers)
    x_t, mask = M.remask(tokens, 12, distill.schedule, numbers, distill.p_full, distill.p_near)
    grad, aux_logits = distill.dimo_gradient(nets, x_t, mask, cond)
    return M.surrogate(logits, grad), M.aux_loss(aux_logits, tokens, mask)


def test_a_step_of_distillation_is_the_mean_of_its_micro_batches():
    nets = networks()
    process = one_process(accumulate=2)
    loaded = small_teacher(nets.teacher)
    optimizers = resting('generator', 'aux', nets=nets)
    with mock.patch.multiple(distill, clip=0.0, log_every=6):
        numbers, logits = distill.update(nets, optimizers, loaded, process, step=5)
    found = gradients(nets.generator), gradients(nets.aux)
    assert logits.shape == (4, 16, 12)
    assert numbers['divergence'] > 0
    assert torch.isclose(numbers['norm_generator'], found[0].norm())
    nets.generator.zero_grad()
    nets.aux.zero_grad()
    for k in range(2):
        generator_loss, psi_loss = dimo_step(nets, loaded, process, 5, k)
        (generator_loss / 2).backward()
        (psi_loss / 2).backward()
    near(found[0], gradients(nets.generator), 1e-6)
    near(found[1], gradients(nets.aux), 1e-6)


def test_the_released_order_gives_the_auxiliary_model_a_draw_of_its_own():
    nets = networks()
    process = one_process()
    loaded = small_teacher(nets.teacher)
    optimizers = resting('generator', 'aux', nets=nets)
    with mock.patch.multiple(distill, clip=0.0, reuse=False):
        numbers, _ = distill.update(nets, optimizers, loaded, process, step=5)
    found = gradients(nets.generator), gradients(nets.aux)
    nets.generator.zero_grad()
    nets.aux.zero_grad()
    generator_loss, other_loss = dimo_step(nets, loaded, process, 5, 0)
    _, psi_loss = dimo_step(nets, loaded, process, 5, 0, 'fresh')
    generator_loss.backward()
    psi_loss.backward(inputs=list(nets.aux.parameters()))
    near(found[0], gradients(nets.generator), 1e-6)
    near(found[1], gradients(nets.aux), 1e-6)
    assert torch.isclose(numbers['aux_loss'], psi_loss)
    assert not torch.isclose(psi_loss, other_loss)
    assert torch.isclose(distill.released_aux_loss(nets, loaded, process, 5, 0), psi_loss)


def test_learning_rates_rise_stay_and_fall_by_their_laws():
    papers = [rate_law(step, 100, 10, 0.0) for step in (0, 4, 9, 99)]
    assert np.allclose(papers, [0.1, 0.5, 1, 1])
    falling = [rate_law(step, 100, 10, 0.5) for step in (4, 50, 75, 99, 100)]
    assert np.allclose(falling, [0.5, 1, 0.5, 0.05, 0.05])
    assert rate_law(50, 100, 0, 1.0) == 0.5
    assert rate_law(0, 0, 0, 1.0) == 1
    cosine = [cosine_law(step, 100) for step in (0, 25, 50, 100)]
    assert np.allclose(cosine, [1, 0.5 + 0.125 ** 0.5, 0.5, 0])
    to_a_tenth = [cosine_law(step, 100, floor=0.1) for step in (0, 50, 100)]
    assert np.allclose(to_a_tenth, [1, 0.55, 0.1])


# -----------------------------------------------------------------------------
# The GAN stage

def gan_parts(B=4):
    """A frozen teacher, a discriminator on it, real tokens, conditions, the logits of a generator."""
    teacher = small_model(depth=4).requires_grad_(False)
    disc = gan.Discriminator(teacher.D, teacher.grid, gan.head_layers(4), 3 * teacher.D, 16, True)
    real = some_tokens(B)
    cond = some_cond(B)
    return teacher, disc, real, cond, torch.randn(B, 16, 12, requires_grad=True)


def test_heads_sit_on_evenly_spaced_blocks():
    layers = [gan.head_layers(depth) for depth in (4, 6, 12, 24)]
    assert layers == [[1, 2, 4], [2, 4, 6], [3, 6, 9, 12], [6, 12, 18, 24]]


def test_heads_mix_neighbours_on_the_grid_or_along_the_line():
    for grid, reached in (((4, 4), {1, 4, 5}), (None, {1, 2, 3, 4})):  # from the first place, besides itself
        head = gan.Head(24, 16, grid, 8, False)
        h = torch.randn(1, 16, 24, requires_grad=True)
        grad, = torch.autograd.grad(head(h, torch.randn(1, 8))[0, 0], h)
        assert set(grad[0].abs().sum(1).nonzero()[:, 0].tolist()) == {0} | reached


def test_gan_losses_have_their_closed_forms():
    real = torch.randn(6)
    fake = torch.randn(6)
    assert torch.allclose(gan.gan_loss(fake, False), -fake.sigmoid().log().mean())
    both = real.sigmoid().log() + (1 - fake.sigmoid()).log()
    assert torch.allclose(gan.disc_loss(real, fake, False), -both.mean())
    assert gan.gan_loss(fake, True) == -fake.mean()
    assert gan.disc_loss(torch.tensor([2.0]), torch.tensor([-2.0]), True) == 0
    assert gan.disc_loss(torch.tensor([0.5]), torch.tensor([0.5]), True) == 2


def test_real_and_fake_are_masked_alike_at_a_share_below_r_max():
    teacher, _, real, cond, _ = gan_parts(50)
    same_tokens = 1e4 * F.one_hot(real, 12).float()  # a fake that is real
    with mock.patch.object(teacher, 'embed', wraps=teacher.embed) as embed:
        with mock.patch.object(gan, 'r_max', 0.6):
            real_states, fake_states, r = gan.look(teacher, real, same_tokens, cond, rng(0))
    masks = [call.args[1] for call in embed.call_args_list]
    assert len(masks) == 2
    assert torch.equal(*masks)
    assert torch.equal(masks[0].sum(1), (r[:, 0] * 16).round().long())
    assert r.shape == (50, 1)
    assert 0 <= r.min() < 0.1
    assert 0.5 < r.max() <= 0.6
    assert len(real_states) == len(gan.head_layers(4))
    for of_real, of_fake in zip(real_states, fake_states, strict=True):
        assert torch.allclose(of_real, of_fake, atol=1e-5)


def test_the_discriminator_sees_the_relaxation_asked_for():
    teacher, _, real, cond, logits = gan_parts()
    for relax in ('soft', 'gumbel', 'st'):
        with mock.patch.object(teacher, 'embed', wraps=teacher.embed) as embed:
            with mock.patch.multiple(gan, relax=relax, tau_soft=0.7):
                gan.look(teacher, real, logits, cond, rng(0))
        fake = embed.call_args_list[0].args[0]
        if relax == 'soft':
            assert torch.equal(fake, (logits / 0.7).softmax(-1))
        else:
            assert torch.equal(fake, F.one_hot(fake.argmax(-1), 12).float())


def test_through_pixels_codes_that_look_alike_are_alike_in_real_and_fake():
    tokenizer = small_tokenizer().requires_grad_(False)
    tokenizer.codebook.weight[1] = tokenizer.codebook.weight[0]
    real = some_tokens(3)
    temperature = gan.blur_temperature(tokenizer, real)
    shown = gan.seen_through_pixels(tokenizer, temperature, real)
    assert shown.shape == (3, 16, 12)
    near(shown.sum(-1), torch.ones(3, 16), 1e-5)
    near(-torch.xlogy(shown, shown).sum(-1).mean(), torch.tensor(gan.BLUR_NATS), 1e-2)
    same(gan.seen_through_pixels(tokenizer, temperature, F.one_hot(real, 12).float()), shown)
    swapped = torch.where(real == 0, 1, real)
    assert not torch.equal(swapped, real)
    same(gan.seen_through_pixels(tokenizer, temperature, swapped), shown)
    moved = torch.where(real == 0, 2, real)            # to a code that looks otherwise
    assert (gan.seen_through_pixels(tokenizer, temperature, moved) - shown).abs().max() > 1e-3

    brute = torch.cdist(tokenizer.latents(tokenizer.decode(real)), tokenizer.table).square()
    near(shown, (-brute / temperature).softmax(-1), 1e-4)
    tokenizer.codebook.weight[:] = tokenizer.codebook.weight[0]
    with exits_with('--through_pixels needs 1.0 nats a token', 'leave 2.48 to 2.48'):
        gan.blur_temperature(tokenizer, real)


def test_the_look_through_pixels_carries_a_gradient_to_the_logits_of_its_own_image():
    teacher, disc, real, cond, logits = gan_parts()
    tokenizer = small_tokenizer().requires_grad_(False)
    shown = partial(gan.seen_through_pixels, tokenizer, gan.blur_temperature(tokenizer, real))
    _, fake_states, r = gan.look(teacher, real, logits, cond, rng(0), shown)
    pooled = teacher.pooled(cond)
    first = disc.eval()(fake_states, pooled, r)[0]
    grad, = torch.autograd.grad(first, logits)
    assert grad[0].norm() > 0
    assert grad[1:].abs().max() == 0
    same_tokens = 1e4 * F.one_hot(real, 12).float()    # a fake that is real
    real_states, fake_states, _ = gan.look(teacher, real, same_tokens, cond, rng(0), shown)
    for of_real, of_fake in zip(real_states, fake_states, strict=True):
        near(of_real, of_fake, 1e-5)


def test_the_gan_gradient_equals_autograds_image_by_image_in_every_relaxation():
    teacher, disc, real, cond, logits = gan_parts()
    pooled = teacher.pooled(cond)
    for relax, hinge in (('soft', False), ('gumbel', False), ('st', True)):
        with mock.patch.multiple(gan, relax=relax, hinge=hinge):
            _, fake_states, r = gan.look(teacher, real, logits, cond, rng(0))
            wanted = []
            for k in range(4):
                one = slice(k, k + 1)
                verdict = disc.eval()([h[one] for h in fake_states], pooled[one], r[one])
                loss = -verdict if hinge else -verdict.sigmoid().log()
                grad, = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
                wanted.append(grad[k])
            found = gan.gan_gradient(disc.train(), fake_states, pooled, r, logits)
        assert torch.allclose(found, torch.stack(wanted), atol=1e-7)
        assert (found.abs().amax((1, 2)) > 1e-6).all()
        assert untouched(teacher)
        assert untouched(disc)


def test_masked_positions_say_nothing_of_the_fake():
    teacher, disc, _, cond, logits = gan_parts()
    mask = M.random_positions((4, 16), 8, None, 'cpu')
    for relax in ('soft', 'gumbel', 'st'):
        emb = teacher.embed(M.relaxed(logits, relax), mask)
        states = teacher.features(emb, cond, gan.head_layers(4))
        grad = gan.gan_gradient(disc, states, teacher.pooled(cond), torch.full((4, 1), 0.5), logits)
        assert torch.equal(grad.abs().sum(-1) > 0, ~mask), relax


def test_real_equals_fake_where_everything_is_masked_or_the_fake_is_real():
    teacher, disc, real, cond, logits = gan_parts()
    disc.eval()

    def verdict(x, mask, share):
        states = teacher.features(teacher.embed(x, mask), cond, gan.head_layers(4))
        return disc(states, teacher.pooled(cond), torch.full((4, 1), share))
    everything = torch.ones(4, 16, dtype=torch.bool)
    hidden_fake = verdict(logits.softmax(-1), everything, 1.0)
    assert torch.equal(verdict(real, everything, 1.0), hidden_fake)
    d_real = verdict(real, ~everything, 0.0)
    d_fake = verdict(F.one_hot(real, 12).float(), ~everything, 0.0)
    assert torch.equal(d_real, d_fake)
    assert (d_real > 0).float().mean() + (d_fake < 0).float().mean() == 1  # right in half of the cases


def test_heads_learn_a_fixed_pair_and_hear_caption_and_masked_share():
    teacher, disc, real, cond, logits = gan_parts(8)
    optimizer = torch.optim.AdamW(disc.parameters(), lr=1e-2, betas=(0.9, 0.99))
    real_states, fake_states, r = gan.look(teacher, real, logits, cond, rng(0))
    for _ in range(60):
        optimizer.zero_grad()
        health = gan.judge(disc, real_states, fake_states, teacher.pooled(cond), r)
        optimizer.step()
    assert health['acc_real'] == health['acc_fake'] == 1
    assert health['d_real'] > 1
    assert health['d_fake'] < -1
    assert untouched(teacher)
    assert logits.grad is None
    states = [torch.randn(8, 16, 24)] * 3
    words = torch.randn(8, 72)
    r = torch.full((8, 1), 0.3)
    disc.eval()
    verdict = disc(states, words, r)
    assert (verdict - disc(states, 0 * words, r)).abs().min() > 1e-4
    assert (verdict - disc(states, words, 0 * r)).abs().min() > 1e-4


def test_a_gan_step_sends_the_weighted_sum_of_both_gradients_to_the_generator():
    nets = networks()
    process = one_process()
    nets.disc = gan.Discriminator(24, (4, 4), gan.head_layers(2), 3 * 24, 16, False)
    loaded = small_teacher(nets.teacher)
    optimizers = resting('generator', 'aux', 'disc', nets=nets)
    with mock.patch.multiple(gan, w_dimo=3.0, w_gan=5.0, clip=0.0):
        gan.update(nets, optimizers, loaded, process, step=5)
    found = gradients(nets.generator)
    heads = gradients(nets.disc)
    assert untouched(nets.teacher)
    assert heads.norm() > 0
    nets.generator.zero_grad()
    nets.disc.zero_grad()
    numbers = micro_rng(gan.seed, 5, 0, process)
    real, cond, logits, tokens = gan.draw_batch(nets, loaded, process, numbers)
    x_t, mask = M.remask(tokens, 12, gan.schedule, numbers, gan.p_full, gan.p_near)
    stay_close, _ = gan.dimo_gradient(nets, x_t, mask, cond)
    real_states, fake_states, r = gan.look(nets.teacher, real, logits, cond, numbers)
    pooled = nets.teacher.pooled(cond)
    gan.judge(nets.disc, real_states, fake_states, pooled, r)
    deceive = gan.gan_gradient(nets.disc, fake_states, pooled, r, logits)
    M.surrogate(logits, 3 * stay_close + 5 * deceive).backward()
    near(found, gradients(nets.generator), 1e-6)
    near(heads, gradients(nets.disc), 1e-6)


def test_a_steered_gan_has_the_ratio_of_the_gradients_that_is_asked_for():
    nets = networks()
    nets.disc = gan.Discriminator(24, (4, 4), gan.head_layers(2), 3 * 24, 16, False)
    optimizers = resting('generator', 'aux', 'disc', nets=nets)
    for weight in (0.1, 5.0):
        with mock.patch.multiple(gan, w_dimo=3.0, w_gan=weight, gan_ratio=2.5):
            numbers, _ = gan.update(nets, optimizers, small_teacher(nets.teacher), one_process(), step=5)
        assert math.isclose(numbers['grad_gan'], 2.5 * numbers['grad_dimo'], rel_tol=1e-4)


def test_advice_is_given_of_a_saturated_discriminator_and_of_mere_sharpening():
    first = dict(acc_real=0.6, acc_fake=0.6, entropy=0.2, gap=1.0)
    assert gan.advice(first, first) == set()
    assert gan.advice(dict(entropy=0.09, gap=0.9), first) == set()
    saturated, = gan.advice(dict(first, acc_real=0.95, acc_fake=0.95), first)
    sharpened, = gan.advice(dict(first, entropy=0.09, gap=0.4), first)
    assert '--disc_lr' in saturated
    assert '--relax=st' in sharpened


# -----------------------------------------------------------------------------
# Rewards

PROMPTS = ['a', 'b b', 'c c c']


def test_the_reward_gradient_equals_finite_differences_in_float64():
    tokenizer = small_tokenizer().requires_grad_(False)
    logits = torch.randn(3, 16, 12)
    with mock.patch.multiple(reward, relax='soft', tau=0.7):
        grad, images = reward.reward_gradient(logits, PROMPTS, tokenizer, TOY_REWARDS, None, weight=0.3)
    assert grad.dtype == torch.float32
    assert images.shape == (3, 3, 16, 16)
    tokenizer.double()

    def loss(z):
        decoded = tokenizer.decode((z / 0.7).softmax(-1))
        return -0.3 * (2 * darkness(decoded, PROMPTS) + 0.5 * contrast(decoded, PROMPTS)).sum()
    for k in range(3):  # image by image
        direction = torch.zeros(3, 16, 12, dtype=torch.float64)
        direction[k] = torch.randn(16, 12)
        above = loss(logits.double() + 1e-4 * direction)
        below = loss(logits.double() - 1e-4 * direction)
        assert torch.allclose((grad * direction).sum(), (above - below) / 2e-4, rtol=1e-3)


def test_a_reward_is_differentiable_down_to_the_logits_and_no_further_in_every_relaxation():
    torch.manual_seed(0)
    judge = TwoTower('conv', 5, 3)
    tokenizer = small_tokenizer().requires_grad_(False)
    nets = networks()
    logits, _ = M.one_step(nets.generator, some_cond(3))

    def follows(images, prompts):
        text = judge.text_features(word_ids(prompts, 'abcde', 3))
        return F.logsigmoid(judge.score(judge.image_features(images), text))
    rewards = dict(follows=(1.0, follows))
    for relax in ('soft', 'gumbel', 'st'):
        with mock.patch.object(reward, 'relax', relax):
            grad, images = reward.reward_gradient(logits, PROMPTS, tokenizer, rewards, rng(0))
        assert torch.isfinite(grad).all(), relax
        assert (grad.abs().amax((1, 2)) > 0).all(), relax
        assert untouched(nets.generator)
        assert not images.requires_grad
    with mock.patch.object(reward, 'relax', 'soft'):
        grad, before = reward.reward_gradient(logits, PROMPTS, tokenizer, rewards, None)
        _, after = reward.reward_gradient(logits - grad, PROMPTS, tokenizer, rewards, None)
    assert (follows(after, PROMPTS) > follows(before, PROMPTS)).all()  # the loss is minus the reward


def test_the_gradient_of_no_image_exceeds_its_limit_at_the_generators_input():
    generator = small_model()
    cond = some_cond(4)
    emb = torch.randn(4, 16, 24, requires_grad=True)
    logits = generator(emb, cond)
    grad = torch.randn(4, 16, 12) * torch.tensor([1e-3, 1.0, 10.0, 1e-3])[:, None, None]

    def sizes(at_logits):
        at_input, = torch.autograd.grad((logits * at_logits).sum(), emb, retain_graph=True)
        return at_input.flatten(1).norm(dim=1)
    with mock.patch.object(reward, 'image_clip', 0.5):
        limited, share = reward.limit_images(emb, logits, grad)
    assert share == 0.5
    assert torch.equal(limited[[0, 3]], grad[[0, 3]])
    assert torch.allclose(sizes(limited), sizes(grad).clamp(max=0.5), rtol=1e-4)
    assert torch.allclose(F.cosine_similarity(limited.flatten(1), grad.flatten(1)), torch.ones(4))


def test_rewards_are_ramped_in_and_added_to_the_surrogate():
    nets = networks()
    process = one_process()
    loaded = small_teacher(nets.teacher)
    optimizers = resting('generator', 'aux', nets=nets)
    settings = dict(w_dimo=3.0, steps=8, ramp=0.5, image_clip=0.0, clip=0.0)
    with mock.patch.multiple(reward, **settings):  # step 1 of a ramp of 4: half
        reward.update(nets, optimizers, loaded, process, step=1)
    found = gradients(nets.generator)
    nets.generator.zero_grad()
    numbers = micro_rng(reward.seed, 1, 0, process)
    captions, cond, emb, logits, tokens = reward.draw_batch(nets, loaded, process, numbers)
    please, _ = reward.reward_gradient(logits, captions, loaded.tokenizer, TOY_REWARDS, numbers, 0.5)
    x_t, mask = M.remask(tokens, 12, reward.schedule, numbers, reward.p_full, reward.p_near)
    stay_close, _ = reward.dimo_gradient(nets, x_t, mask, cond)
    M.surrogate(logits, please + 3 * stay_close).backward()
    near(found, gradients(nets.generator), 1e-6)
    assert torch.equal(logits, nets.generator(emb, cond))
    assert tokens.shape == (4, 16)
    with mock.patch.multiple(reward, **dict(settings, image_clip=1e-4)):
        logged, *_ = reward.update(nets, optimizers, loaded, process, step=1)
    assert logged['clipped_images'] == 1
    assert nets.generator.pos_emb.grad[:, :16].norm() < 1.01e-4  # the mean over images, at the input


def test_a_held_out_reward_that_has_turned_ends_the_run():
    assert not reward.has_turned([], 3)
    assert not reward.has_turned([9, 1], 0)
    assert not reward.has_turned([1, 5, 4, 3], 3)
    assert reward.has_turned([1, 5, 4, 3, 4.9], 3)
    assert not reward.has_turned([1, 5, 4, 3, 6], 3)


# -----------------------------------------------------------------------------
# Test-time optimisation

def climb(emb, **settings):
    """A toy ascent: the image is a slice of the embedding, its score a parabola with the top at 1
    -> what it yields."""
    def draw_images(e):
        images = e[:, :, :1, None]
        return images, images
    settings = {**dict(iterations=6, lr=0.2, clip=0.0, pull=0.0), **settings}
    with mock.patch.multiple(tteo, **settings):
        return list(tteo.ascend(emb, draw_images, parabola))


def parabola(images):
    return -(images - 1).flatten(1).square().sum(1)


def test_a_step_of_tteo_is_sgd_uphill_limited_and_pulled_image_by_image():
    start = torch.randn(5, 4, 3)
    emb = (start + 1).requires_grad_()
    longest = emb.detach().flatten(1).norm(dim=1).median().item()     # of two images in five the gradient is longer
    for clip, pull in ((0.0, 0.0), (longest, 0.0), (0.0, 2.0)):
        with mock.patch.multiple(tteo, lr=0.1, clip=clip, pull=pull):
            moved = tteo.step_up(emb, start, -(emb ** 2).flatten(1).sum(1) / 2)
        grad = -emb.detach() - pull  # of -|e|^2 / 2 - pull |e - start|^2 / 2
        if clip:
            grad = grad * (clip / grad.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
        assert torch.allclose(moved, emb + 0.1 * grad, atol=1e-6)


def test_tteo_keeps_the_best_iterate_from_the_first_on():
    emb = torch.randn(5, 4, 3)
    for lr in (0.2, 50.0):  # the second overshoots at once
        iterates = climb(emb, lr=lr)
        scores = torch.stack([row[0] for row in iterates])
        kept = torch.stack([row[1] for row in iterates])
        assert len(iterates) == 7
        assert torch.equal(kept, scores.cummax(0).values)
        assert torch.equal(parabola(iterates[-1][2]), kept[-1])  # the image that has this score
    assert (climb(emb)[-1][1] > climb(emb)[0][0]).all()
    best = torch.tensor([1.0, 2.0]), torch.zeros(2, 3)
    score, images = tteo.keep_better(best, torch.tensor([3.0, 2.0]), torch.ones(2, 3))
    assert score.tolist() == [3, 2]
    assert images[:, 0].tolist() == [1, 0]  # the earlier one if equal


def test_tteo_moves_each_image_by_itself_within_its_limits():
    emb = torch.randn(5, 4, 3)
    free = climb(emb)
    for k in range(5):  # whatever the batch
        alone = climb(emb[k:k + 1])
        assert torch.equal(alone[-1][2], free[-1][2][k:k + 1])
    assert (climb(emb, pull=5.0)[-1][3] < free[-1][3]).all()
    assert (climb(emb, clip=0.1)[1][3] <= 0.2 * 0.1 + 1e-6).all()


def test_tteo_hands_out_and_scores_the_image_that_it_names():
    loaded = small_teacher(small_model())
    cond = some_cond(3)
    emb = M.start_embedding(loaded.net, 3, 0.6, 0.1, rng(0)).detach()
    logits = loaded.net(emb, cond)
    soft = loaded.tokenizer.decode(logits.softmax(-1))
    hard = loaded.tokenizer.decode(logits.argmax(-1))
    for output, handed_out in (('soft', soft), ('tokens', hard)):
        with mock.patch.multiple(tteo, output=output, relax='soft', tau=1.0):
            draw_images = tteo.drawing(loaded, cond, PROMPTS, None)
            climbed, given = draw_images(emb.requires_grad_())
            assert torch.equal(given, handed_out)
            assert torch.equal(climbed, soft)
            assert climbed.requires_grad
            with torch.no_grad():
                assert torch.equal(draw_images(emb.detach())[1], handed_out)


def test_best_of_n_costs_what_tteo_costs():
    assert tteo.passes_of(0, 'soft') == 1
    assert tteo.passes_of(10, 'soft') == 31
    assert tteo.passes_of(10, 'tokens') == 41
    assert tteo.passes_of(8, 'soft', starts=4) == 29
    with mock.patch.multiple(tteo, iterations=8, starts=4, output='soft', best_of=0):
        assert tteo.control_draws() == 29
        with mock.patch.object(tteo, 'best_of', 64):
            assert tteo.control_draws() == 64


EQUATIONS = collected(globals())  # python test_all.py equations


# -----------------------------------------------------------------------------
# Whole runs

def saved(folder, stage):
    """The checkpoint of a stage, read as anyone may: no code in it."""
    return torch.load(f'{folder}/{stage}.pt', weights_only=True)


def log_of(folder, stage):
    with open(f'{folder}/{stage}.log.jsonl') as file:
        return [json.loads(line) for line in file]


def table_of(path):
    """The rows of a table that a stage wrote."""
    with open(path) as file:
        return json.load(file)['rows']


LOGGED = {
    'distill': 'divergence aux_loss entropy max_prob',
    'gan': 'divergence acc_real acc_fake d_real d_fake grad_dimo grad_gan entropy max_prob gap',
    'reward': 'divergence reward held_out clipped saturation toy_fd grad_dimo grad_reward',
}
ROWS = {
    'distill': ['teacher, 1 step', 'teacher, 3 steps', 'student, 1 step'],
    'gan': ['teacher, 3 steps', 'distill, 1 step', 'gan, 1 step'],
    'reward': ['teacher, 2 steps', 'start, distill', 'rewarded, 1 step'],
}


def test_every_stage_ends_with_its_table_log_and_pictures():
    folder, texts = tiny_run()
    for stage, keys in LOGGED.items():
        rows = table_of(f'{folder}/{stage}.json')
        names = [row['name'] for row in rows]
        assert names == ['real images', 'tokenizer reconstruction', *ROWS[stage]]
        assert all(math.isfinite(row['toy_fd']) for row in rows)
        assert 'background' in texts[f'{stage}.py']
        last = saved(folder, stage)['step']
        log = log_of(folder, stage)
        assert [line['step'] for line in log] == list(range(2, last + 1, 2))
        for line in log:
            assert 0 <= line['divergence'] < 99
            assert all(math.isfinite(line[key]) for key in keys.split())
        for when in ('', '-000000', f'-{last:06d}'):
            assert Image.open(f'{folder}/{stage}{when}.png').size[0] > 100
    for key in ('reward', 'held_out', 'clipped', 'saturation'):
        assert all(math.isfinite(row[key]) for row in rows)
    passes = [row['passes'] for row in table_of(f'{folder}/distill.json')]
    assert passes == [0, 0, 1, 5, 1]
    assert 'against 200 held-out renders' in texts['distill.py']
    assert 'ties in reader' in texts['gan.py']
    assert 'color_attr' in texts['reward.py']
    assert 'training two small reward models' in texts['reward.py']


def test_distillation_and_gan_move_every_weight_but_the_embedding_tables():
    folder, _ = tiny_run()
    teacher = saved(folder, 'model')['ema']
    student = saved(folder, 'distill')
    after_gan = saved(folder, 'gan')['net']
    pairs = [(teacher, student['net']), (teacher, student['aux']), (teacher, student['ema']),
             (student['ema'], after_gan)]
    for before, after in pairs:
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert set(before) - moved == {'tok_emb.weight', 'cond_emb.weight'}


def test_muon_has_a_momentum_of_its_own_for_the_auxiliary_model():
    adam, muon, aux_adam, aux_muon = saved(tiny_run()[0], 'distill')['optimizers']
    assert muon['param_groups'][0]['momentum'] == 0.95
    assert aux_muon['param_groups'][0]['momentum'] == distill.aux_momentum == 0.8
    assert 'betas' in adam['param_groups'][0]
    assert 'betas' in aux_adam['param_groups'][0]


def test_the_rewarded_generator_is_the_best_by_the_held_out_reward(tmp_path):
    folder, _ = tiny_run()
    start = saved(folder, 'distill')['ema']
    middle = saved(folder, 'reward.prev')['average']
    end = saved(folder, 'reward')
    held = [row['held_out'] for row in end['history']]
    best = held.index(max(held))
    same(end['ema'], [start, middle, end['average']][best])
    must_run(f'sample.py --ckpt={folder}/reward.pt --n=2 --grid={tmp_path}/x.png')


def test_each_update_alone_moves_its_network_the_right_way(tmp_path):
    folder = ready_for('distill.py', tmp_path)
    networks = {}
    for part, off in (('net', 'aux'), ('aux', 'generator')):  # train one, leave the other as it is
        must_run(f'distill.py --out_dir={folder} --overwrite --{off}_lr=0 --{off}_muon=0 --warmup=0 --cfg_scale=3 '
                 '--tau=0.05 --steps=20 --teacher_steps=1')
        networks[part] = network_of(saved(folder, 'distill'), part)
    start = saved(folder, 'model')
    teacher = network_of(start)
    cond = start['prompts'][:500].long()
    before, tokens = M.one_step(teacher, cond, tau=0.05, rng=rng(0))
    after, _ = M.one_step(networks['net'], cond, tau=0.05, rng=rng(0))
    x_t, mask = M.remask(tokens, teacher.mask_id, 'arccos', rng(0))
    guided = M.guided_logits(teacher, x_t, cond, 3.0)
    grad = M.dimo_grad(guided, teacher(x_t, cond), mask, distill.beta)
    moved = ((after - before) * grad).sum().item()
    loss_before = M.aux_loss(teacher(x_t, cond), tokens, mask).item()
    loss_after = M.aux_loss(networks['aux'](x_t, cond), tokens, mask).item()
    print(f'    logits moved along the divergence gradient by {moved:.3f}')
    print(f'    auxiliary loss {loss_before:.4f} -> {loss_after:.4f}')
    assert moved < 0
    assert loss_after < loss_before


def test_the_gan_gradient_alone_deceives_a_frozen_discriminator(tmp_path):
    folder = ready_for('gan.py', tmp_path)
    must_run(f'gan.py --out_dir={folder} --w_dimo=0 --disc_lr=0 --disc_muon=0 --disc_warmup=0 '
             '--spectral=false --r_max=0 --warmup=0')
    start = saved(folder, 'distill')
    end = saved(folder, 'gan')
    teacher = network_of(saved(folder, 'model'))
    cond = start['prompts'][:200].long()
    disc = gan.Discriminator(teacher.D, teacher.grid, [1, 2], 8 * teacher.D, gan.disc_width, False)
    disc.load_state_dict(end['disc'])
    losses = []
    for generator in (network_of(start), network_of(end, 'net')):
        logits, _ = M.one_step(generator, cond, rng=rng(0))
        states = teacher.features(teacher.embed(logits.softmax(-1)), cond, [1, 2])
        d_fake = disc(states, teacher.pooled(cond), torch.zeros(200, 1))
        losses.append(gan.gan_loss(d_fake, False).item())
    print(f'    -log D(fake) {losses[0]:.5f} -> {losses[1]:.5f}')
    assert losses[1] < losses[0]


def test_gan_warns_once_of_a_saturated_discriminator(tmp_path):
    folder = ready_for('gan.py', tmp_path)
    text = must_run(f'gan.py --out_dir={folder} --steps=3 --log_every=1 --batch_size=32 --r_max=0 '
                    '--disc_warmup=150 --disc_muon=0 --disc_lr=0.01 --spectral=false')
    assert text.count('the discriminator is right in more than 90 % of the cases') == 1


STEP = 'torch.optim.AdamW.step'                # of every network once in an update


def test_a_wish_to_stop_during_the_warm_up_of_the_heads_ends_the_run(tmp_path):
    folder = ready_for('gan.py', tmp_path)
    asked = KILL.format(call=STEP, nth=1, signal='SIGINT')
    must_run(f'gan.py --out_dir={folder}', before=asked)
    assert not os.path.exists(f'{folder}/gan.pt')
    assert log_of(folder, 'gan') == []


def test_recomputing_blocks_changes_no_bit_of_a_run_with_hinge_losses(tmp_path):
    networks = []
    for switch in ('false', 'true'):
        folder = ready_for('gan.py', f'{tmp_path}/{switch}')
        must_run(f'gan.py --out_dir={folder} --steps=4 --hinge --grad_checkpoint={switch}')
        networks.append(saved(folder, 'gan')['net'])
    same(*networks)


def test_a_gan_that_looks_through_pixels_resumes_to_the_same_bits(tmp_path):
    asked = '--steps=4 --log_every=2 --through_pixels --gan_ratio=2'
    whole = ready_for('gan.py', f'{tmp_path}/whole')
    must_run(f'gan.py --out_dir={whole} {asked}')
    ratios = [row['ratio'] for row in log_of(whole, 'gan')]
    assert ratios and all(math.isclose(ratio, 2, rel_tol=1e-3) for ratio in ratios)
    parts = ready_for('gan.py', f'{tmp_path}/parts')
    must_run(f'gan.py --out_dir={parts} {asked}', before=KILL.format(call=STEP, nth=8, signal='SIGINT'))
    assert 0 < saved(parts, 'gan')['step'] < 4
    must_run(f'gan.py --out_dir={parts} {asked} --resume')
    same(saved(parts, 'gan')['net'], saved(whole, 'gan')['net'])


def test_a_gan_run_trains_its_heads_and_hands_on_what_it_was_given():
    folder, _ = tiny_run()
    end = saved(folder, 'gan')
    for optimizer in end['optimizers'][-2:]:   # AdamW and Muon of the heads
        for state in optimizer['state'].values():
            momentum = state.get('exp_avg', state.get('momentum_buffer'))
            assert momentum.abs().max() > 0
    start = saved(folder, 'distill')
    for key in ('args', 'words', 'data', 'prompts', 'tokenizer'):
        same(end[key], start[key])


def test_compiled_networks_give_the_same_log(tmp_path):
    if not shutil.which('g++'):
        raise SkipTest('torch.compile needs a C++ compiler')
    folder = ready_for('distill.py', f'{tmp_path}/out')
    logs = []
    for choice in ('false', 'true'):
        must_run(f'distill.py --out_dir={folder} --overwrite --compile={choice} --steps=4 --teacher_steps=1',
                 before=PRECISION.format(False))
        logs.append(log_of(folder, 'distill'))
    assert len(logs[0]) == 2
    for plain, compiled in zip(*logs, strict=True):
        for key, value in plain.items():
            assert abs(value - compiled[key]) <= 1e-3 * (1 + abs(value)), (key, plain, compiled)
    for script in ('gan.py', 'reward.py'):     # without the compiler
        folder = ready_for(script, f'{tmp_path}/{script}')
        text = must_run(f'{script} --out_dir={folder} --steps=4 --compile', before=TRACED)
        assert 'recompile_limit' not in text
        assert 'followed' in text


def test_every_stage_runs_on_a_gpu_and_its_files_elsewhere(tmp_path):
    question = ON_GPU + 'import torch\nprint(torch.cuda.is_available())'
    seen = subprocess.run([sys.executable, '-c', question], capture_output=True, text=True)
    if 'True' not in seen.stdout:
        raise SkipTest('needs a CUDA GPU')
    for script in SCRIPTS:
        assert 'on cpu' not in must_run(f'{script} --out_dir={tmp_path}', before=ON_GPU)
    must_run(f'distill.py --out_dir={tmp_path} --steps=16 --resume', before=ON_GPU)
    assert len(log_of(tmp_path, 'distill')) == 8
    must_run(f'tteo.py --ckpt={tmp_path}/reward.pt --n=5 --iterations=2', before=ON_GPU)
    text = must_run(f'sample.py --ckpt={tmp_path}/model.pt --bench --batch=4', before=ON_GPU)
    assert 'images_per_s' in text
    must_run(f'sample.py --ckpt={tmp_path}/gan.pt --n=4')     # on the CPU


def test_bias_of_the_relaxation_is_printed_beside_its_bound():
    text = must_run(f'gan.py --out_dir={tiny_run()[0]} --bias')
    number = r' +([\d.]+)'
    rows = re.findall(f'(?:decoder|first block){4 * number}', text)
    assert len(rows) == 6                      # teacher, distill.pt, gan.pt
    for entropy, trace, bias, bound in rows:
        assert float(bias) <= float(bound)


# -----------------------------------------------------------------------------
# Drawing and measuring

def png(folder, k):
    return pathlib.Path(f'{folder}/{k:05d}.png').read_bytes()


def test_sampling_writes_the_same_image_whatever_the_batch(tmp_path):
    three = f'{tmp_path}/three'
    single = f'{tmp_path}/single'
    grid = f'{tmp_path}/grid.png'
    ask = f'sample.py --ckpt={tiny_run()[0]}/distill.pt --prompt "a red circle" --grid={grid}'
    must_run(f'{ask} --n=3 --png_dir={three}')
    text = must_run(f'{ask} --n=2 --batch=1 --png_dir={single}')
    assert '2 images, seeds (0, 0..1), 1 network pass' in text
    assert os.path.exists(grid)
    assert len(os.listdir(three)) == 4
    text = must_run(f'{ask} --n=3')            # without a folder
    assert f'ms per image on cpu -> {grid}' in text
    assert png(single, 0) != png(single, 1)
    for k in range(2):
        assert png(three, k) == png(single, k)


def test_images_are_written_as_they_are_drawn_by_all_processes_and_packed(tmp_path):
    folder = tmp_path / 'many'
    ask = ['sample.py', f'--ckpt={tiny_run()[0]}/distill.pt', '--prompt', 'a red\ncircle', '--n=7', '--batch=2',
           f'--grid={tmp_path}/x.png']
    packed = [f'--npz={folder}.npz']
    killed = KILL.format(call='os.replace', nth=6, signal='SIGKILL')     # names two texts first
    assert run(*ask, *packed, before=killed)[0] != 0
    assert len(list(folder.glob('0*.png'))) == 3 and not os.path.exists(f'{folder}.npz')
    text = must_run(*ask, *packed)
    assert '4 of them drawn now' in text and 'the first 7 -> ' in text
    lines = (folder / 'captions.txt').read_text().split('\n')
    assert lines[6:] == ['00006.png\ta red circle', '']
    pixels = np.load(f'{folder}.npz')['arr_0']
    assert pixels.shape == (7, 32, 32, 3) and pixels.dtype == np.uint8
    for k, image in enumerate(pixels):
        assert np.array_equal(image, Image.open(folder / f'{k:05d}.png'))
    must_refuse(*ask, *packed, words='many.npz: is there already')
    assert 'drawn now' in must_run(*ask, f'--png_dir={tmp_path}/two', processes=2, torchrun=True)
    assert sorted(os.listdir(tmp_path / 'two')) == sorted(os.listdir(folder))
    for k in range(7):                         # a new process may round otherwise than a forked one
        again = np.asarray(Image.open(tmp_path / 'two' / f'{k:05d}.png')).astype(int)
        assert abs(again - pixels[k]).max() <= 1, abs(again - pixels[k]).max()


def test_no_file_of_others_is_replaced_and_no_image_of_others_taken_for_these(tmp_path):
    ask = f'sample.py --ckpt={tiny_run()[0]}/distill.pt --grid={tmp_path}/x.png --png_dir={tmp_path}/L'
    for name in ('00001.png', 'captions.txt'):
        shutil.rmtree(tmp_path / 'L', ignore_errors=True)
        os.mkdir(tmp_path / 'L')
        (tmp_path / 'L' / name).write_text('mine')
        must_refuse(f'{ask} --n=2', words=f'{name}: is there and was not drawn here')
        assert os.listdir(tmp_path / 'L') == [name] and (tmp_path / 'L' / name).read_text() == 'mine'
    (tmp_path / 'L.json').write_text('{"my": 1}')
    must_refuse(f'{ask} --n=2', words='L.json: does not say what')
    os.remove(tmp_path / 'L.json')
    os.remove(tmp_path / 'L' / name)
    (tmp_path / 'L' / 'other.png').write_text('mine')
    must_run(f'{ask} --n=2')
    assert (tmp_path / 'L' / 'other.png').read_text() == 'mine'
    about = json.loads((tmp_path / 'L.json').read_text())
    (tmp_path / 'L.json').write_text(json.dumps(dict(about, network='before')))        # it was trained again
    must_refuse(f'{ask} --n=2', words='images of network before, not')
    (tmp_path / 'L.json').write_text(json.dumps(about))
    for change, words in {'--n=3': 'of n 2, not 3', '--n=2 --top_k=4': 'of top_k 0, not 4'}.items():
        must_refuse(f'{ask} {change}', words=words)


def test_what_is_drawn_is_the_one_step_generator_with_the_settings_of_its_run(tmp_path):
    state = saved(tiny_run()[0], 'distill')
    state['net']['bias'] += torch.randn(64, 32)
    state['config']['tau_sample'] = 0.5
    torch.save(state, f'{tmp_path}/cold.pt')
    cond = word_ids(['a red circle'] * 3, WORDS, 8)
    tokenizer = T.Tokenizer.from_checkpoint(state['tokenizer'])
    for weights in ('ema', 'net'):
        must_run(f'sample.py --ckpt={tmp_path}/cold.pt --prompt "a red circle" --n=3 '
                 f'--weights={weights} --png_dir={tmp_path}/{weights}')
        generator = network_of(state, weights)
        student = M.student_sampler(generator, distill.r_init, distill.sigma_init, 0.5)
        tokens = student(cond, image_rngs(0, range(3)))
        image = tokenizer.decode(tokens)[2].clamp(-1, 1)
        wanted = (image.permute(1, 2, 0).numpy() + 1) * 127.5
        drawn = np.asarray(Image.open(f'{tmp_path}/{weights}/00002.png')).astype(float)
        assert abs(drawn - wanted).max() < 1.5


def test_a_sweep_measures_sixteen_settings_and_prints_sample_count_seeds_and_reference(tmp_path):
    folder = ready_for('distill.py', tmp_path)
    text = must_run(f'sample.py --ckpt={folder}/model.pt --sweep --steps=2 --n_metrics=30 --n_reference=600')
    for words in ('600 held-out renders', 'seeds (0, 0..29)', 'ties in reader', *TASKS):
        assert words in text
    rows = table_of(f'{folder}/model-sweep-n_metrics=30-n_reference=600-steps=2.json')
    assert len({row['name'] for row in rows} - {'real images'}) == 16
    assert all(row['n'] == 30 and row['toy_fd'] > 0 and row['error']['reader'] > 0 for row in rows), rows


# -----------------------------------------------------------------------------
# Folders, and what starts first

def grey_classes(root):
    """Forty grey images in two classes, zero and one, which differ in brightness."""
    for k in range(40):
        name = ('zero', 'one')[k % 2]
        os.makedirs(f'{root}/{name}', exist_ok=True)
        Image.new('L', (28, 28), 60 * (k % 2) + k).save(f'{root}/{name}/{k}.png')
    return root


def test_folder_goes_through_the_whole_pipeline(tmp_path):
    data = grey_classes(f'{tmp_path}/data')
    folder = f'{tmp_path}/out'
    judge = Reference(open_data(data, 32), UNTRAINED)
    captions, images = judge.prompts(20)
    assert judge.measure(images, captions)['accuracy'] > 0.8  # real ones get their own class
    for script in ('tokenizer.py', 'model.py', 'distill.py', 'gan.py'):
        must_run(f'{script} --out_dir={folder} --data={data} --steps=5')
    must_run(f'reward.py --out_dir={folder} --steps=2')
    must_run(f'tteo.py --ckpt={folder}/reward.pt --n=3 --iterations=1')
    named = pathlib.Path(f'{folder}/tteo-iterations=1-n=3.json').read_text()       # which another does not replace
    assert named == pathlib.Path(f'{folder}/tteo.json').read_text()
    row = table_of(f'{folder}/distill.json')[0]
    assert row['reference'] == (f'20 images of {data} (real images: 20 others; models and reader were '
                                'trained on both)')
    ask = f'sample.py --ckpt={folder}/distill.pt --n=2'
    for label in ('zero', '1'):                # the classes are 0 one, 1 zero
        text = must_run(f'{ask} --label={label} --png_dir={tmp_path}/{label}')
        assert ('note: no class is called 1; drawn is number 1 of them, from 0, which is zero' in text) == (label == '1')
        lines = pathlib.Path(f'{tmp_path}/{label}/captions.txt').read_text()
        assert lines == '00000.png\tzero\n00001.png\tzero\n'
    must_refuse(f'{ask} --label=two', words='one, zero')
    must_refuse(f'distill.py --out_dir={folder} --data=shapes --overwrite', words='was trained on')
    os.rename(data, f'{tmp_path}/moved')
    here = f'--data={tmp_path}/moved'
    text = must_run(f'distill.py --teacher_ckpt={folder}/model.pt {here} --steps=1 --out_dir={tmp_path}/again')
    assert f'20 images of {tmp_path}/moved' in text
    must_refuse(f'tteo.py --ckpt={folder}/reward.pt', words=f'--data={data}: no such folder')
    for command in (f'gan.py --init={folder}/distill.pt --steps=1 --out_dir={folder} --overwrite',
                    f'reward.py --steps=1 --out_dir={folder} --overwrite', f'tteo.py --ckpt={folder}/reward.pt --n=3 --iterations=1',
                    f'sample.py --ckpt={folder}/reward.pt --metrics --n_metrics=8 --n_reference=8'):
        must_run(f'{command} {here}')


def test_ending_distill_ends_the_training_that_it_started(tmp_path):
    command = [sys.executable, f'{HERE}/distill.py', f'--out_dir={tmp_path}']
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)
    while 'tokens of' not in child.stdout.readline():         # the tokenizer's plan: it trains
        assert child.poll() is None
    child.send_signal(signal.SIGHUP)           # is passed on
    os.killpg(child.pid, signal.SIGTERM)       # the trainer gets it twice
    assert child.wait(60) == 1
    text = child.stdout.read()
    assert 'tokenizer.py did not finish' in text, text
    assert 'stopped' not in text, text
    assert 'Traceback' not in text, text


# -----------------------------------------------------------------------------
# The same bits after an interruption, the same numbers on two processes

def test_a_run_killed_or_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = tiny_run()[0]
    cases = [('tokenizer', 'os.replace', 4, 'SIGKILL'),       # between the two renames of a save; one is the log's
             ('model', STEP, random.randint(5, 8), 'SIGKILL'),        # after the first save, at step 4
             ('model', STEP, random.randint(5, 7), 'SIGINT'),         # Ctrl-C: saves, ends in peace
             ('distill', STEP, random.randint(9, 24), 'SIGKILL'),     # in either half of an update
             ('gan', STEP, random.randint(15, 36), 'SIGKILL'),
             ('reward', STEP, random.randint(9, 15), 'SIGKILL'),
             ('reward', STEP, random.randint(9, 14), 'SIGHUP')]       # a closed terminal
    for k, (stage, call, nth, how) in enumerate(cases):
        print(f'    {stage}.py gets {how} at number {nth} of {call}')
        folder = ready_for(f'{stage}.py', f'{tmp_path}/{k}')
        deadly = KILL.format(call=call, nth=nth, signal=how)
        code, text = run(f'{stage}.py --out_dir={folder}', before=deadly)
        assert 'Traceback' not in text, text[-1500:]
        if how != 'SIGKILL':
            calls_of_a_step = {'model': 1, 'reward': 2}[stage]        # one for each network
            assert code == 0
            assert saved(folder, stage)['step'] == math.ceil(nth / calls_of_a_step)
        else:
            assert code == -signal.SIGKILL
        must_run(f'{stage}.py --out_dir={folder} --resume')
        a = saved(whole, stage)
        b = saved(folder, stage)
        same({**a, 'config': 0}, {**b, 'config': 0})
        log = log_of(folder, stage)
        assert log == log_of(whole, stage)
        assert len(log) == a['step'] // 2


def test_nobody_continues_or_builds_on_something_else_in_silence(tmp_path):
    folder = ready_for('distill.py', tmp_path)
    os.remove(f'{folder}/tokenizer.pt')
    must_run(f'tokenizer.py --out_dir={folder} --seed=1')
    other = 'made with a tokenizer other than the present one'
    must_refuse(f'model.py --out_dir={folder} --resume', words=other)
    must_refuse(f'distill.py --out_dir={folder}', words=other)
    teacher = f'--teacher_ckpt={folder}/model.pt'
    must_refuse(f'distill.py --out_dir={folder}/open --data=shapes-open {teacher}', words='trained on shapes, not on')
    folder = ready_for('gan.py', tmp_path / 'gan')
    start = torch.load(f'{folder}/distill.pt', weights_only=True)
    torch.save(dict(saved(tiny_run()[0], 'gan'), origin=dict(start='another')), f'{folder}/gan.pt')
    os.remove(f'{folder}/distill.pt')
    torch.save(dict(start, step=3), f'{folder}/distill.pt')
    text = must_run(f'gan.py --out_dir={folder} --resume')
    assert 'gan.pt was made with another generator as its start' in text
    assert 'distill.pt is unfinished, at step 3 of 12' in text


def test_a_run_never_replaces_the_checkpoint_of_another_unasked(tmp_path):
    whole = tiny_run()[0]
    for script in SCRIPTS:
        stage = script[:-3]
        folder = ready_for(script, f'{tmp_path}/{stage}')
        for name in (f'{stage}.pt', f'{stage}.log.jsonl'):
            shutil.copyfile(f'{whole}/{name}', f'{folder}/{name}')
        must_refuse(f'{script} --out_dir={folder} --steps=3', words='--resume')
        same(saved(folder, stage), saved(whole, stage))
        assert log_of(folder, stage) == log_of(whole, stage)
    must_run(f'reward.py --out_dir={folder} --steps=3 --overwrite')
    assert saved(folder, stage)['step'] == 3


def test_every_stage_runs_in_float32_and_in_bfloat16(tmp_path):
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
    other = not capabilities.get('avx512_bf16')               # the tests above run in one of them
    wanted = 'bf16 autocast' if other else 'float32, the CPU has no bf16'
    for script in SCRIPTS:
        text = must_run(f'{script} --out_dir={tmp_path}', before=PRECISION.format(other))
        assert wanted in text, text[:300]


def test_bfloat16_chooses_no_other_code():
    tokenizer = small_tokenizer()
    z = torch.randn(2, 16, 4)
    with torch.autocast('cpu', torch.bfloat16):
        ids = tokenizer.nearest(z)
    assert torch.equal(ids, tokenizer.double().nearest(z.double()))


def momenta(script, folder, processes):
    """What Adam and Muon hold after one step: multiples of the averaged, clipped gradient."""
    command = f'{script} --out_dir={folder} --steps=1 --micro_batch=4'
    if script == 'gan.py':                     # its power iteration counts passes
        command += ' --disc_warmup=0 --spectral=false'
    must_run(command, processes=processes)
    state = saved(folder, script[:-3])
    found = []
    for optimizer in state.get('optimizers', [state.get('optimizer')]):
        for kept in optimizer['state'].values():
            found.append(kept.get('exp_avg', kept.get('momentum_buffer')))
    return found


def test_two_processes_give_the_gradient_of_one(tmp_path):
    for script in SCRIPTS:
        one = momenta(script, ready_for(script, f'{tmp_path}/{script}1'), 1)
        two = momenta(script, ready_for(script, f'{tmp_path}/{script}2'), 2)
        largest = max(x.abs().max() for x in one)
        assert len(one) > 10
        for a, b in zip(one, two, strict=True):
            assert (a - b).abs().max() < 1e-4 * largest, script


def test_bench_shows_that_one_pass_for_both_updates_saves_two_forwards_of_ten(tmp_path):
    folder = ready_for('distill.py', tmp_path)
    flops = []
    for reuse in ('true', 'false'):
        text = must_run(f'distill.py --bench --out_dir={folder} --reuse={reuse} --cfg_scale=2')
        line = text[text.index('bench: '):]
        bench = {key: float(value) for key, value in re.findall(r'(\w+) ([\d.]+)', line)}
        assert bench['ms_per_step'] > 0
        assert bench['images_per_s'] > 0
        assert bench['peak_memory_mb'] > 100
        assert 0 < bench['share_of_peak'] < 1
        flops.append(bench['gflop_per_step'])
    assert 1.15 < flops[1] / flops[0] < 1.35, flops           # 10 / 8, but for frozen tables


# -----------------------------------------------------------------------------
# Rewards and test-time optimisation, whole runs

def test_reward_alone_raises_the_reward(tmp_path):
    folder = ready_for('reward.py', tmp_path)
    must_run(f'reward.py --out_dir={folder} --w_dimo=0 --warmup=0')
    start = saved(folder, 'distill')
    end = saved(folder, 'reward')
    prompt_ids = start['prompts'][:200]
    captions = captions_of(prompt_ids, WORDS)
    judge = world_reward(f'{folder}/rewards.pt', 'clip', 'cpu')
    tokenizer = T.Tokenizer.from_checkpoint(start['tokenizer'])
    means = []
    for generator in (network_of(start), network_of(end, 'net')):
        logits, _ = M.one_step(generator, prompt_ids.long(), 0.9, 0.03, rng=rng(0))
        images = tokenizer.decode(logits.softmax(-1))
        means.append(judge(images, captions).mean().item())
    print(f'    reward {means[0]:.4f} -> {means[1]:.4f}')
    assert means[1] > means[0]


def run_tteo(name, settings=''):
    """-> what it printed, what it wrote."""
    text = must_run(f'tteo.py --ckpt={tiny_run()[0]}/reward.pt --iterations=2 --starts=2 --n=5 --half_decoder=false '
                    f'--name={name} {settings}')
    with open(f'{name}.json') as file:
        return text, json.load(file)


def column(rows, key):
    return [row[key] for row in rows]


def test_tteo_writes_its_table_curve_and_grid_whatever_the_batch(tmp_path):
    text, found = run_tteo(f'{tmp_path}/all')
    for words in ('TTEO, 2 x 2 steps', 'seeds (0, 0..4)', 'soft output'):
        assert words in text
    assert os.path.exists(f'{tmp_path}/all.png')
    assert os.path.exists(f'{tmp_path}/all-curve.png')
    kept = column(found['trajectory'], 'kept')
    assert kept == sorted(kept)
    assert column(found['trajectory'], 'passes') == [3, 6, 9]
    assert column(found['table'], 'passes') == [1, 9, 9]
    control = found['best_of']
    assert control[-1]['passes'] == 9
    assert abs(kept[0] - control[1]['kept']) < 1e-6           # the better one of two starts
    _, again = run_tteo(f'{tmp_path}/two', '--batch=2')
    assert np.allclose(column(again['trajectory'], 'kept'), kept, atol=1e-3)
    text, tokens = run_tteo(f'{tmp_path}/tokens', '--output=tokens')
    assert column(tokens['trajectory'], 'passes') == [3, 7, 11]
    assert 'tokens output' in text
    assert 'best of 11' in text


def test_tteo_compares_its_images_with_real_ones(tmp_path):
    text, found = run_tteo(f'{tmp_path}/far', '--n_reference=40')
    generator, optimised, chosen = found['distances']
    assert column(found['distances'], 'name') == column(found['table'], 'name')
    assert optimised['accuracy'] == found['table'][1]['accuracy']
    assert generator['reader'] != optimised['reader'] != chosen['reader']
    assert '40 held-out renders' in text
    must_refuse(f'tteo.py --ckpt={tiny_run()[0]}/reward.pt --n=3 --n_reference=40 --name={tmp_path}/x',
                words='at least 4 images')


def test_the_first_draw_of_tteo_is_what_sample_draws(tmp_path):
    folder, _ = tiny_run()
    _, found = run_tteo(f'{tmp_path}/x')
    state = saved(folder, 'reward')
    _, captions = draw(HELD_OUT + 10 ** 6 + np.arange(5))
    cond = word_ids(captions, WORDS, 8)
    logits, _ = M.one_step(network_of(state), cond, 0.9, 0.03, rng=image_rngs(0, range(5)))
    images = T.Tokenizer.from_checkpoint(state['tokenizer']).decode(logits.softmax(-1))
    judge = world_reward(f'{folder}/rewards.pt', 'clip', 'cpu')
    assert abs(found['best_of'][0]['kept'] - judge(images, captions).mean()) < 1e-4


def test_a_teacher_of_tuples_without_a_grid_whose_decoder_reads_goes_through_all_stages(tmp_path):
    rehearsed = dict(before='import common.rehearsal\n')
    must_run('distill.py', f'--out_dir={tmp_path}', '--teacher_ckpt=any', '--cfg_scale=1.5', **rehearsed)
    must_run('gan.py', f'--out_dir={tmp_path}', '--steps=4', **rehearsed)
    must_run('reward.py', f'--out_dir={tmp_path}', '--steps=4', **rehearsed)
    must_run('tteo.py', f'--ckpt={tmp_path}/reward.pt', '--n=5', '--iterations=2', **rehearsed)
    text = must_run('sample.py', f'--ckpt={tmp_path}/gan.pt', '--metrics', '--n_metrics=20',
                    '--n_reference=40', **rehearsed)
    assert 'ties in reader' in text
    heads = torch.load(f'{tmp_path}/gan.pt')['disc']
    assert heads['heads.0.mix.weight'].shape == (24, 1, 9)                   # along the line


# -----------------------------------------------------------------------------
# Published teachers

class Inception(torch.nn.Module):
    """A stand-in with the signature of the published TorchScript network."""

    def __init__(self):
        super().__init__()
        self.register_buffer('w', torch.randn(12, 6, generator=rng(0)))

    def forward(self, x: torch.Tensor, return_features: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        h = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 64
        return h if return_features else (h @ self.w).softmax(1)


def some_pixels():
    """Forty images, uint8 (40, 16, 16, 3)."""
    return np.random.RandomState(0).randint(0, 255, (40, 16, 16, 3), dtype=np.uint8)


def inception_files(folder):
    """inception.pt, and its reference with 40 images (ref.npz) or without (bare.npz)."""
    torch.jit.script(Inception()).save(f'{folder}/inception.pt')
    pixels = some_pixels()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    features = Inception()(images, return_features=True).double().numpy()
    moments = dict(mu=features.mean(0), sigma=np.cov(features.T))
    np.savez(f'{folder}/ref.npz', **moments, arr_0=pixels)
    np.savez(f'{folder}/bare.npz', **moments)


def published_files(kind, folder):
    """A published teacher in miniature, in two files -> the settings that name them."""
    os.makedirs(folder, exist_ok=True)
    net = f'{folder}/net.pth'
    tokenizer = f'{folder}/tokenizer.ckpt'
    torch.save(published(mini(kind), kind), net)
    torch.save(published(mini_tokenizer(kind), kind), tokenizer)
    return f'--teacher={kind} --teacher_path={net} --tokenizer_path={tokenizer}'


def ten_classes(folder):
    """An image in each of ten class folders, with names as ImageNet's -> the setting."""
    for k, pixels in enumerate(some_pixels()[:10]):
        os.makedirs(f'{folder}/n0144{k}')
        Image.fromarray(pixels).save(f'{folder}/n0144{k}/x.png')
    return f'--data={folder}'


def test_published_teachers_go_through_distillation_gan_and_sampling_by_their_recipes(tmp_path):
    inception_files(tmp_path)
    fid = f'--inception={tmp_path}/inception.pt --ref={tmp_path}/ref.npz'
    drawn = {'maskgit': ('--student', 1), 'maskbit': ('--steps=4', 7)}
    for kind, (option, passes) in drawn.items():
        folder = f'{tmp_path}/{kind}'
        files = published_files(kind, folder)
        text = must_run(f'distill.py {files} --out_dir={folder} --steps=4')
        assert f'recipe of --teacher={kind}: --generator_lr=1e-05' in text
        assert '--inception=FILE' in text      # no data, no table
        assert os.path.exists(f'{folder}/distill-000004.png')
        student = saved(folder, 'distill')
        assert set(student['tokenizer']) == {'kind', 'path', 'grid', 'S', 'digest'}   # not its weights
        made = student['config']
        assert (made['steps'], made['batch_size']) == (4, 8)  # the command line's
        assert (made['cfg_scale'], made['aux_lr']) == (2.0, 1e-5)
        assert made['beta'] == distill.RECIPES[kind]['beta']

        data = ten_classes(f'{folder}/data')
        text = must_run(f'gan.py --out_dir={folder} {data} --steps=4')        # the rest from distill.pt
        assert f'recipe of --teacher={kind}: --flips=True' in text
        assert '20 real images' in text        # mirrored ones, too
        assert 'gan, 1 step' in text
        made = saved(folder, 'gan')['config']
        assert (made['teacher'], made['r_init'], made['w_gan']) == (kind, 0.6, 200.0)

        must_run(f'sample.py --ckpt={folder}/gan.pt --metrics --n_metrics=8 {data}')
        text = must_run(f'sample.py --ckpt={folder}/distill.pt --metrics --n_metrics=30 {fid}')
        assert 'FID@30 ' in text
        assert 'precision' in text
        text = must_run(f'sample.py {files} --label=3 --n=2 --grid={folder}/x.png {option}')
        assert f'{passes} network pass' in text
        assert os.path.exists(f'{folder}/x.png')
    os.rename(f'{folder}/tokenizer.ckpt', f'{tmp_path}/moved.ckpt')
    with exits_with('tokenizer.ckpt', '--tokenizer_path'):
        T.Tokenizer.from_checkpoint(student['tokenizer'])
    T.Tokenizer.from_checkpoint(student['tokenizer'], f'{tmp_path}/moved.ckpt')


def test_a_published_teacher_of_a_class_folder_goes_through_rewards_and_tteo(tmp_path):
    data = ten_classes(f'{tmp_path}/data')
    files = published_files('maskbit', tmp_path)
    must_run(f'distill.py {files} {data} --out_dir={tmp_path} --steps=2')
    text = must_run(f'reward.py --out_dir={tmp_path} --steps=2')
    assert 'recipe of --teacher=maskbit' in text
    assert 'rewarded, 1 step' in text
    assert saved(tmp_path, 'reward')['config']['teacher'] == 'maskbit'
    text = must_run(f'tteo.py --ckpt={tmp_path}/reward.pt --n=3 --iterations=1')
    assert 'recipe of --teacher=maskbit: --clip=0.0' in text
    assert 'best of 4' in text


def fid_of(text):
    return float(re.search(r'FID@30 ([\d.]+)', text)[1])


def test_fid_and_is_are_measured_whatever_the_batch_and_the_processes(tmp_path):
    inception_files(tmp_path)
    inception = f'{tmp_path}/inception.pt'
    files = published_files('maskgit', tmp_path)
    ask = f'sample.py {files} --student --metrics --n_metrics=30 --inception={inception}'
    text = must_run(f'{ask} --ref={tmp_path}/ref.npz --batch=7')
    assert 'FID@30 ' in text
    assert 'FID ' not in text                  # a name for 50,000 images
    assert 'precision' in text
    assert hashlib.sha256(pathlib.Path(inception).read_bytes()).hexdigest() in text
    for processes in (1, 2):
        again = must_run(f'{ask} --ref={tmp_path}/bare.npz', processes=processes)
        assert 'no precision and recall' in again
        assert abs(fid_of(text) - fid_of(again)) < 1e-3 * fid_of(text)
    with open(re.search('-> (.*json)', text)[1]) as file:
        results = json.load(file)
    assert results['FID@30'] and results['precision'] >= 0 and results['config']['tau'] == 1.0 and results['passes'] == 1
    ten_classes(f'{tmp_path}/data')
    must_run(f'sample.py --inception={inception} --ref={tmp_path}/made.npz --ref_from={tmp_path}/data --ref_size=16')
    again = must_run(f'{ask} --ref={tmp_path}/made.npz --seed=3')
    assert 'precision' in again and 'seed=3' in again


SMALL_MASKGIT = """
from common import teachers
sizes = dict(N=16, V=32, D=32, depth=3, n_head=2, n_words=10, mlp=64)
teachers.TRANSFORMERS['maskgit'].update(sizes)
sizes = dict(image_size=16, ch=32, ch_mult='1,1,2', n_res=1, n_codes=32, code_dim=8, z=8, up=1)
teachers.TOKENIZERS['maskgit'].update(sizes)
"""


def test_a_published_size_is_timed_without_any_file():
    ask = '--bench --teacher=maskgit --teacher_path=random'
    for script in ('distill.py', 'gan.py'):
        assert 'ms_per_step' in must_run(f'{script} {ask}', before=SMALL_MASKGIT)
    text = must_run(f'sample.py {ask} --steps=16 --batch=4', before=SMALL_MASKGIT)
    assert 'steps 16, passes 31, batch 4, images_per_s' in text


# -----------------------------------------------------------------------------
# Recipes and errors

TEACHERS_OWN = (distill, gan, reward, tteo, sample)           # scripts with recipes


def configured(script, *arguments):
    """-> the settings of a script of that command line, what is printed. No checkpoint is read."""
    g = dict(vars(script))
    with capture() as text:
        settings = common_run.configure(g, script.RECIPES, None, list(arguments))
    return settings, text.getvalue()


def test_every_recipe_can_be_taken_is_printed_and_gives_way_to_the_command_line():
    for script in TEACHERS_OWN:
        before, text = configured(script)
        assert text == ''
        for kind, recipe in script.RECIPES.items():
            settings, text = configured(script, f'--teacher={kind}')
            assert settings == {**before, **recipe, 'teacher': kind}
            for key, value in recipe.items():
                assert f' --{key}={value}' in text, (script.__name__, kind, key)
            key = list(recipe)[0]
            given = type(recipe[key])(1)
            settings, text = configured(script, f'--teacher={kind}', f'--{key}={given}')
            assert settings[key] == given
            assert f' --{key}=' not in text


def test_every_command_that_is_timed_on_a_gpu_is_one_that_its_script_takes():
    scripts = {f'{script.__name__}.py': script for script in TEACHERS_OWN}
    seen = set()
    for kind in timing.SIZES:
        for command in timing.commands(kind):
            name, *arguments = command.split()
            settings, _ = configured(scripts[name], *arguments)
            assert settings['bench'] and settings['teacher'] == kind, command
            seen.add(name)
    assert seen == set(scripts)
    line = 'bench: steps 1, images_per_s of the network 12.5, of the decoder 4.0, of both 3.0'
    assert timing.numbers_of(f'x\n{line}\n')['network'] == 12.5
    assert timing.numbers_of('no such line') == {}
    table = must_run('common/timing.py --minutes=0 --teacher=maskgit')
    assert table.count('not run: no time was left') == len(timing.commands('maskgit'))


def test_help_shows_the_recipes():
    for script in TEACHERS_OWN:
        text = must_run(f'{script.__name__}.py --help')
        assert 'RECIPES = {' in text
        assert script.__doc__.strip() in text


def test_a_recipe_with_a_mistake_is_no_fault_of_the_user():
    for wrong in (dict(stepz=3), dict(steps=3.0)):
        with mock.patch.dict(distill.RECIPES, maskgit=wrong):
            try:
                configured(distill, '--teacher=maskgit')
            except TypeError as error:
                assert 'in a recipe is no setting' in str(error)
            else:
                raise AssertionError(f'{wrong} was taken')


def test_errors_of_the_scripts_are_one_line(tmp_path):
    folder = ready_for('distill.py', tmp_path)
    done, _ = tiny_run()
    to_folder = f'--out_dir={folder}'
    to_done = f'--out_dir={done}'
    teacher = f'sample.py --ckpt={done}/model.pt'
    student = f'sample.py --ckpt={done}/distill.pt'
    rewarded = f'tteo.py --ckpt={done}/reward.pt'
    purple = '--prompt "a purple circle"'
    cases = {
        'distill.py --batchsize=3': 'unknown setting --batchsize; did you mean --batch_size?',
        'distill.py --micro_batch=3': 'batch_size 8 is not a multiple of 1 process(es) x 3',
        'distill.py --teacher_ckpt=no.pt': 'no.pt: no such checkpoint',
        f'distill.py --teacher_ckpt={folder}/tokenizer.pt': 'is a tokenizer checkpoint',
        f'distill.py --teacher=maskgit {to_folder}': '--teacher=maskgit needs --teacher_path=FILE',
        f'gan.py {to_folder}': 'distill.pt: no such checkpoint',
        f'gan.py --init={done}/model.pt': 'expected distill or gan or reward',
        f'gan.py --w_gan=0 --w_dimo=0 --overwrite {to_done}': 'leave nothing to learn',
        'tokenizer.py --ch_mult=1,1,1,1,1,1,1': 'image_size 32 is not a multiple of 64',
        'tokenizer.py --ch_mult=0,1': 'a level without channels',
        'tokenizer.py --lr=-1': '--lr=-1.0 cannot be, expected at least 0',
        f'model.py --n_head=5 --overwrite {to_folder}': 'not a multiple of n_head',
        f'model.py --lr=-1 {to_folder}': '--lr=-1.0 cannot be, expected at least 0',
        f'{teacher} {purple}': "unknown word 'purple'",
        f'{teacher} --label=cat': '--prompt',
        f'{teacher} --steps=99': 'more than the 64 tokens',
        f'{teacher} --metrics --n_metrics=2': '--n_metrics',
        f'{teacher} --r_init=.5': '--r_init has no effect here',
        f'{student} --n=300': 'more than the 256 images of a grid',
        f'{student} --data=/x': '--data has no effect here',
        f'{student} --grid=x': 'expected the name of a picture',
        f'{student} --grid={folder}/tokenizer.pt/x.png': 'cannot write',
        f'{student} --cfg_scale=4': 'is a one-step generator',
        f'{student} --steps=4': 'is a one-step generator',
        f'{student} --sweep': 'is a one-step generator',
        f'reward.py --w_clip=0 --overwrite {to_done}': 'every reward has weight 0',
        f'reward.py --reward_steps=4 --overwrite {to_done}': 'rewards.pt: made in 3 steps',
        f'reward.py --init={done}/reward.pt {to_done}': 'would be overwritten',
        f'{rewarded} {purple}': "unknown word 'purple'",
        f'{rewarded} --w_clip=0': 'every reward has weight 0',
    }
    for command, words in cases.items():
        must_refuse(command, words=words)


# -----------------------------------------------------------------------------
# The repository

PACKAGES = {'torch', 'numpy', 'tqdm', 'PIL', 'scipy', *sys.stdlib_module_names}
HELPERS = ['run', 'world', 'files', 'published', 'folders', 'images', 'pictures', 'reader', 'metrics', 'text', 'rewards']
KNOW_THE_METHOD = ['teachers', 'maskgen', 'meissonic']
FOR_TESTS = ['testing', 'rehearsal', 'power', 'timing', 'test_common', 'test_data', 'test_text']
GUARD = 'main guard'


def source_text(path):
    return pathlib.Path(f'{HERE}/{path}').read_text(encoding='utf-8')


def imports_of(path):
    """-> (module, where) of every import of a file; where: GUARD, a function's name, '' at the top."""
    found = []

    def visit(node, where):
        for child in ast.iter_child_nodes(node):
            inside = where
            if isinstance(child, ast.FunctionDef):
                inside = child.name
            elif isinstance(child, ast.If) and '__main__' in ast.unparse(child.test):
                inside = GUARD
            elif isinstance(child, ast.Import):
                found.extend((name.name, where) for name in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module == 'common':
                found.extend((f'common.{name.name}', where) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.append((child.module, where))
            visit(child, inside)
    visit(ast.parse(source_text(path)), '')
    return found


def is_ours(module):
    return module.startswith('common') or os.path.exists(f'{HERE}/{module}.py')


def test_five_packages_are_enough_and_transformers_is_asked_for_where_it_is_used():
    for path in glob.glob('*.py', root_dir=HERE) + glob.glob('common/*.py', root_dir=HERE):
        if os.path.basename(path)[:-3] in FOR_TESTS:
            continue
        for module, where in imports_of(path):
            package = module.split('.')[0]
            if package == 'transformers':
                assert where, path
            else:
                assert is_ours(module) or package in PACKAGES, (path, module)


def test_every_text_file_is_opened_in_a_named_encoding():
    for path in glob.glob('*.py', root_dir=HERE) + glob.glob('common/*.py', root_dir=HERE):
        if os.path.basename(path)[:-3] in (*FOR_TESTS, 'test_all'):
            continue
        for node in ast.walk(ast.parse(source_text(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'open':
                mode = ast.unparse(node.args[1]) if len(node.args) > 1 else 'r'
                assert 'b' in mode or 'encoding=' in ast.unparse(node), (path, node.lineno)


def test_stages_import_the_method_and_the_helpers_and_no_stage():
    for stage in ('distill', 'gan', 'reward', 'tteo', 'sample'):
        for module, _ in imports_of(f'{stage}.py'):
            if is_ours(module):
                assert module in ('model', 'tokenizer') or module.startswith('common.'), (stage, module)
                assert module.removeprefix('common.') not in FOR_TESTS, (stage, module)


def test_model_and_tokenizer_need_torch_alone_and_common_only_to_train_and_to_read_files():
    needed = {'tokenizer.py': {'torch'}, 'model.py': {'torch', 'tokenizer'}}
    for path, packages in needed.items():
        for module, where in imports_of(path):
            package = module.split('.')[0]
            if package == 'common':
                assert where in (GUARD, 'from_pretrained'), (path, module)
            elif where != GUARD:
                assert package in packages | sys.stdlib_module_names, (path, module)
    from_tokenizer = re.findall('^from tokenizer import .*', source_text('model.py'), re.M)
    assert from_tokenizer == ['from tokenizer import bit_rows']


def test_helpers_import_those_before_them_and_only_teachers_know_the_method():
    for path in glob.glob('common/*.py', root_dir=HERE):
        name = os.path.basename(path)[:-3]
        if name in FOR_TESTS:
            continue
        before = HELPERS
        if name in ('run', 'world'):
            before = []
        elif name in HELPERS:
            before = HELPERS[:HELPERS.index(name)]
        allowed = {f'common.{helper}' for helper in before}
        if name in KNOW_THE_METHOD:
            allowed |= {'model', 'tokenizer', 'common.maskgen', 'common.meissonic', 'common.text'}
        found = {module for module, _ in imports_of(path) if is_ours(module)}
        assert found <= allowed, (name, found - allowed)
    assert 'paper' in source_text('common/__init__.py').splitlines()[0]


def definition(path, dotted):
    """The text of a function or class, or of a method, as in 'MDM.embed'."""
    text = source_text(path)
    node = ast.parse(text)
    for name in dotted.split('.'):
        inner = {}
        for child in ast.walk(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner[child.name] = child
        assert name in inner, f'{path} has no {dotted}'
        node = inner[name]
    return ast.get_source_segment(text, node)


def test_readme_names_the_function_of_each_formula_and_quotes_it():
    table = source_text('README.md').split('<!-- equations -->')[1].split('<!-- end -->')[0]
    rows = re.findall(r'`([\w/]+\.py): ([\w.]+)` +\| +`([^`]+)`', table)
    assert len(rows) == table.count('\n| ') - 1 >= 10
    for path, function, quoted in rows:
        assert quoted in definition(path, function), (path, function, quoted)


def chosen_by(words, tests):
    """Those with one of the words in their name; all of them, where there are no words."""
    found = []
    for test in tests:
        named = any(word in test.__name__ for word in words)
        if not words or named or ('equations' in words and test in EQUATIONS):
            found.append(test)
    return found


if __name__ == '__main__':
    from common import test_common, test_data, test_text

    rest = [test for test in collected(globals()) if test not in EQUATIONS]
    for file in (test_common, test_data, test_text):
        rest += collected(vars(file))
    chosen = chosen_by(sys.argv[1:], EQUATIONS + rest)
    if not chosen:
        sys.exit(f'test_all.py: no test has {" or ".join(sys.argv[1:])} in its name; give parts of names, "equations", '
                 'or nothing for all')
    sys.exit(run_tests(chosen))
