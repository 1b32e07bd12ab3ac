"""
The reader: a small network that is trained to read the images of a data set, and whose features
measure how far other images are from them. What it must read, it sees.

In the shapes world it learns what lies where; in a folder the class of an image, or the words of
its caption, from the files themselves, as there are no others. It also learns to tell whole images
from broken ones, as the faults of a generator are on no real image. Its `features` are the inputs
of its last layer, scaled so that those of real images have mean 0 and, where they differ clearly,
variance 1. The distance on them (common/metrics.py) is Frechet's, but no FID: it compares with
nothing outside.
"""
import hashlib
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import load_checkpoint, restore, save_checkpoint
from common.run import cosine_law, is_rank0, meet, progress, rng_for

# The recipe. It is fixed, so that numbers of different runs can be compared.
SIDE = 32                  # pixels a side that it looks at
CHANNELS = 16              # of its first layer
WIDTH = 48                 # features
FOR_WHOLE = 8              # of them, that tell whether an image is whole; the others tell the facts
N_IMAGES = 20_000          # images that it learns from, at most
STEPS = 1000               # updates
BATCH = 64                 # images an update, and half as many broken ones
RATE = 4e-3                # peak learning rate of Adam
RAREST = 5                 # facts that fewer images show, or do not show, are not learned
NOISE = 0.05               # largest standard deviation of noise on its pixels, so that it overlooks what is faint
FAINT = 0.01               # a direction of less than this share of the largest variance is not scaled up to it
SEED = 0

# What counts as broken
CELL = 4                   # pixels a side of the pieces that are pasted from another image
MOST_PASTED = 0.5          # largest share of them
ZOOM = (1.15, 1.4)         # range of the enlargement, or of its inverse
W_WHOLE = 10.0             # weight of telling whole images from broken ones, beside the sum over all facts
VISIBLE = 0.2              # largest change of a pixel, of 2, from which on an image is broken


# -----------------------------------------------------------------------------
# The network

class Reader(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, n_facts + 1): of each fact, and of being whole."""

    def __init__(self, n_facts):
        super().__init__()
        C = CHANNELS
        self.config = dict(n_facts=n_facts)
        self.body = nn.Sequential(
            nn.Conv2d(3, C, 3, 1, 1), nn.ReLU(),               # (B, C, 32, 32)
            nn.Conv2d(C, 2 * C, 3, 2, 1), nn.ReLU(),           # (B, 2 C, 16, 16)
            nn.Conv2d(2 * C, 2 * C, 3, 2, 1), nn.ReLU(),       # (B, 2 C, 8, 8)
            nn.Conv2d(2 * C, 2 * C, 3, 2, 1), nn.ReLU(),       # (B, 2 C, 4, 4)
            nn.Flatten(),
            nn.Linear(2 * C * 16, WIDTH))
        self.facts = nn.Linear(WIDTH - FOR_WHOLE, n_facts)
        self.whole = nn.Linear(FOR_WHOLE, 1)
        self.register_buffer('mean', torch.zeros(WIDTH, dtype=torch.float64))
        self.register_buffer('scale', torch.eye(WIDTH, dtype=torch.float64))

    def forward(self, images):
        h = self.body(small(images))
        return torch.cat([self.facts(h[:, FOR_WHOLE:]), self.whole(h[:, :FOR_WHOLE])], 1)

    @torch.no_grad()
    def raw_features(self, images):
        """Images (n, 3, H, W), anywhere -> (n, WIDTH) float64."""
        parts = [self.body(small(part)) for part in images.split(500)]
        return torch.cat(parts).double()

    def features(self, images):
        """The same, of mean 0 over real images, their covariance diagonal and at most 1."""
        return (self.raw_features(images) - self.mean) @ self.scale

    def set_scale(self, images):
        """Make it so for these images. Directions in which they hardly differ are not blown up: what
        is broken would count hundreds of times as much as a missing colour, which noise then hides."""
        raw = self.raw_features(images)
        self.mean = raw.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(raw.T))
        values = values.clamp(min=FAINT * values.max())
        self.scale = vectors / values.sqrt()                    # one direction a column


def new_reader(n_facts):
    """Always of the same random weights, and without a draw from the run's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Reader(n_facts)


def small(images):
    """Images (B, 3, H, W), anywhere -> (B, 3, SIDE, SIDE) in [-1, 1] on the CPU."""
    return F.adaptive_avg_pool2d(images.float().cpu().clamp(-1, 1), SIDE)


# -----------------------------------------------------------------------------
# Its training

def examples(source):
    """What it learns from: images (n, 3, SIDE, SIDE), facts float (n, F), those that can be learned."""
    index = source.reader_examples(N_IMAGES)
    images = []
    bad = []                                           # unreadable files: another image is in their place
    for part in np.array_split(index, math.ceil(len(index) / 500)):
        read = small(source.batch(part)[0])
        is_bad = torch.tensor([source.is_bad(i) for i in part])
        images.append(read[~is_bad])
        bad.append(is_bad)
    facts = source.facts(index)[~torch.cat(bad).numpy()]       # (n, all facts) bool
    count = facts.sum(0)
    learned = (count >= RAREST) & (count <= len(facts) - RAREST)
    return torch.cat(images), torch.from_numpy(facts[:, learned]).float()


def broken(images, rng):
    """Images (B, 3, SIDE, SIDE) -> the same broken: half of them with pieces of the image before
    pasted in, half of them with one thing enlarged or made smaller."""
    B = len(images)
    grid = SIDE // CELL
    share = MOST_PASTED * torch.rand(B, 1, 1, 1, generator=rng)
    pasted = torch.rand(B, 1, grid, grid, generator=rng) < share
    pasted = pasted.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
    mixed = torch.where(pasted, images.roll(1, 0), images)

    least, most = ZOOM
    factor = least * (most / least) ** torch.rand(B, generator=rng)
    smaller = torch.rand(B, generator=rng) < 0.5
    factor = torch.where(smaller, 1 / factor, factor)
    centre = centre_of_a_thing(images, rng)
    mode = ('bilinear', 'nearest')[int(torch.randint(2, (), generator=rng))]
    zoomed = torch.where(window(centre), zoom(images, factor, centre, mode), images)
    other = torch.rand(B, 1, 1, 1, generator=rng) < 0.5
    return torch.where(other, zoomed, mixed)


def centre_of_a_thing(images, rng):
    """Centres (B, 2), x and y from -1 to 1, of windows half as wide as the images in which something
    stands whole: there are edges inside, few at the border. A random one of these."""
    side = SIDE // 2
    edges = F.pad((images[:, :, 1:] - images[:, :, :-1]).abs(), (0, 0, 0, 1))
    edges = edges + F.pad((images[..., 1:] - images[..., :-1]).abs(), (0, 1))
    weights = torch.full((1, 1, side, side), -5.0)
    weights[:, :, 1:-1, 1:-1] = 1
    score = F.conv2d(edges.sum(1, keepdim=True), weights, stride=CELL).flatten(1)   # (B, places)
    best = (score * torch.rand(score.shape, generator=rng)).argmax(1)
    places = side // CELL + 1                          # in a row, and in a column
    corner = torch.stack([best % places, best // places], 1)
    return corner * CELL / side - 0.5


def window(centre):
    """Pixels of the window, half as wide as the image, around each of the points `centre` (B, 2),
    x and y from -1 to 1 -> bool (B, 1, SIDE, SIDE)."""
    places = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    inside = (places - centre[:, :, None]).abs() < 0.5         # (B, x and y, SIDE)
    return inside[:, None, 1, :, None] & inside[:, None, 0, None, :]


def zoom(images, factor, centre, mode):
    """Images (B, 3, H, W) enlarged by factor (B,) around the points `centre` (B, 2)."""
    turn = torch.zeros(len(images), 2, 3)
    turn[:, 0, 0] = 1 / factor
    turn[:, 1, 1] = 1 / factor
    turn[:, :, 2] = centre * (1 - 1 / factor)[:, None]
    grid = F.affine_grid(turn, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode, padding_mode='border', align_corners=False)


def reading_loss(net, images, facts, rng):
    """Cross-entropy of all facts (B, F) of images (B, 3, SIDE, SIDE), and of telling these from
    broken ones."""
    B = len(images)
    whole = images[:B // 2]
    pieces = broken(whole, rng)
    harmed = (pieces - whole).abs().amax((1, 2, 3)) > VISIBLE
    both = torch.cat([images, pieces])
    noise = NOISE * torch.rand(len(both), 1, 1, 1, generator=rng)
    logits = net(both + noise * torch.randn(both.shape, generator=rng))
    is_whole = torch.cat([torch.ones(B), 1 - harmed.float()])
    loss_facts = F.binary_cross_entropy_with_logits(logits[:B, :-1], facts, reduction='sum') / B
    loss_whole = F.binary_cross_entropy_with_logits(logits[:, -1], is_whole)
    return loss_facts + W_WHOLE * loss_whole


def train_reader(source):
    """Train the reader of a source on one core -> Reader. The same bits whatever the run has drawn
    before, and however many threads it has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, facts = examples(source)
    net = new_reader(facts.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    bar = progress(STEPS, 'reader')
    for step in range(STEPS):
        optimizer.param_groups[0]['lr'] = RATE * cosine_law(step, STEPS, warmup=50)
        rng = rng_for(SEED, step, 'reader')
        index = torch.randint(len(images), (BATCH,), generator=rng)
        loss = reading_loss(net, images[index], facts[index], rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    bar.close()
    net.set_scale(images)
    torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# Its file

def key_of(source):
    """A digest of the images and of the recipe: a reader of other images, or made otherwise, is
    never used."""
    recipe = [SIDE, CHANNELS, WIDTH, FOR_WHOLE, N_IMAGES, STEPS, BATCH, RATE, RAREST, NOISE, FAINT, SEED,
              CELL, MOST_PASTED, ZOOM, W_WHOLE, VISIBLE]
    text = json.dumps([*source.key(), recipe])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_reader(source, folder):
    """The reader of a source, trained first where its file is neither in `folder` nor in the one above.
    All processes must call this. Raises ValueError, OSError."""
    key = key_of(source)
    path = os.path.join(folder, f'reader-{key}.pt')
    above = os.path.join(folder, '..', f'reader-{key}.pt')
    if os.path.exists(above) and not os.path.exists(path):
        path = above
    if is_rank0() and not os.path.exists(path):
        print(f'{path} is missing: training the network that reads the images for the tables, '
              'expected 1 minute on one CPU core', flush=True)
        net = train_reader(source)
        save_checkpoint(path, dict(stage='reader', step=STEPS, key=key, data=source.data,
                                   args=net.config, net=net.state_dict()))
    meet()
    hint = 'Delete it, it is made again.'
    state = load_checkpoint(path, 'reader', hint)
    if state.get('key') != key:
        raise ValueError(f'{path}: is of other images ({state.get("data")}). {hint}')
    net = new_reader(**state['args'])
    restore(net, state['net'], path, 'net')
    return net.eval().requires_grad_(False)
