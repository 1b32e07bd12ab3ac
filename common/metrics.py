"""
Numbers for pictures: toy distance, precision and recall, prompt following, FID and IS with an
Inception network that the user gives, and the table that ends every stage.
"""
import itertools
import json
import math
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.files import file_digest, first_line
from common.images import decode_images, encode_images
from common.pictures import save_grid
from common.reader import load_reader
from common.run import (image_rngs, progress, rank_and_world, rng_for, say, sum_over_processes,
                        synchronise, writing)

TOY_SIZE = 32                                          # pixels a side that toy_features looks at
NEIGHBOURS = 5                                         # reference images that vote on a label
SHOWN = 16                                             # images per row of a picture
MANY_PASSES = 8                                        # a sampler of more of them draws a quarter of the images
NAME_WIDTH = 26                                        # columns for the name of a table's row
MEASURES = ('reader', 'toy_fd', 'precision', 'recall', 'accuracy')
EXTRAS = ('reward', 'held_out', 'clipped', 'saturation')  # what reward.py measures besides


# -----------------------------------------------------------------------------
# Distances of two sets of images

def toy_weights():
    """The weights of `toy_features`: two convolutions with biases, one projection. NumPy's legacy
    generator is frozen, so that they are the same on every machine."""
    rng = np.random.RandomState(0)

    def draw(gain, *shape):
        fan_in = math.prod(shape[1:])                  # 1 for a bias
        normal = torch.from_numpy(rng.standard_normal(shape)).float()
        return normal * gain / fan_in ** 0.5

    w1 = draw(1.4, 32, 3, 5, 5)
    b1 = draw(0.3, 32)
    w2 = draw(1.4, 64, 32, 3, 3)
    b2 = draw(0.3, 64)
    project = draw(10, 64, 64 * 4 * 4)
    return w1, b1, w2, b2, project


def toy_features(images):
    """Images (B, 3, H, W) in [-1, 1] -> (B, 64) float64: two random convolutions, ReLU, 4x4 average
    pooling, a random projection. It reacts to colour, place, size, shape and background."""
    w1, b1, w2, b2, project = toy_weights()
    features = []
    for part in images.float().cpu().clamp(-1, 1).split(500):
        x = F.adaptive_avg_pool2d(part, TOY_SIZE)              # changes no image of that size
        h = F.relu(F.conv2d(x, w1, b1, stride=2, padding=2))   # (B, 32, 16, 16)
        h = F.relu(F.conv2d(h, w2, b2, stride=2, padding=1))   # (B, 64, 8, 8)
        pooled = F.adaptive_avg_pool2d(h, 4).flatten(1)        # (B, 64 * 16)
        features.append(pooled @ project.T)
    return torch.cat(features).double()


def gaussian_of(x):
    """Features (M, d), or a tuple of mean and covariance -> mean (d,), covariance (d, d).
    Both are float64."""
    if isinstance(x, tuple):
        mean, covariance = x
        return torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    features = x.double()
    d = features.shape[1]
    covariance = torch.cov(features.T).reshape(d, d)   # of one feature torch gives a number
    return features.mean(0), covariance


def partial_sums(x):
    """Features (n, d) -> (d + 1, d + 1) float64: [x, 1]^T [x, 1], which holds the products, the
    sums and the count."""
    x = F.pad(x.double(), (0, 1), value=1)
    return x.T @ x


def moments_of(sums):
    """Partial sums of any number of parts -> mean (d,), covariance (d, d)."""
    d = len(sums) - 1
    n = sums[d, d]
    mean = sums[d, :d] / n
    covariance = (sums[:d, :d] - n * mean[:, None] * mean) / (n - 1)
    return mean, covariance


def sums_by_block(x, B):
    """Partial sums of the B blocks of features (n, d): block b has every B-th row from b on."""
    return [partial_sums(x[b::B]) for b in range(B)]


def frechet_distance(x, y):
    """Frechet distance of two Gaussians in float64 (Heusel et al. 2017), each given by features
    (M, d) or by a tuple of mean and covariance: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The
    last trace is the sum of the singular values of S1^(1/2) S2^(1/2), which stays exact where a
    covariance has no full rank."""
    m1, s1 = gaussian_of(x)
    m2, s2 = gaussian_of(y)
    values, vectors = torch.linalg.eigh(torch.stack([s1, s2]))
    scales = values.clamp(min=0).sqrt()                # rounding may leave an eigenvalue below 0
    root1, root2 = (vectors * scales[:, None]) @ vectors.mT
    cross = torch.linalg.svdvals(root1 @ root2).sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def radii(centres, k=3):
    """Features (M, d) -> (M,): the distance of each to its k-th neighbour among the others."""
    radius = []
    for part in centres.split(1000):
        distance = torch.cdist(part, centres)
        radius.append(distance.kthvalue(k + 1).values)  # the nearest is the centre itself
    return torch.cat(radius)


def covered(centres, radius, points):
    """Which of the points (N, d) lie inside some ball around a centre (M, d), of radius (M,)? ->
    bool (N,)"""
    inside = []
    for part in points.split(1000):
        hits = torch.cdist(part, centres) < radius      # (N, M)
        inside.append(hits.any(1))
    return torch.cat(inside)


def inside_manifolds(real, fake, radius=None):
    """Which fakes do real balls cover (their share is the precision), and which real points the
    balls of fakes (the recall; Kynkaanniemi et al. 2019, k = 3)? Features (M, d), (N, d), `radii` of
    real where they are known -> bool arrays (N,), (M,)."""
    real = real.double()                                # cdist cancels in float32
    fake = fake.double()
    if radius is None:
        radius = radii(real)
    inside = covered(real, radius, fake)
    reached = covered(fake, radii(fake), real)
    return inside.cpu().numpy(), reached.cpu().numpy()


def precision_recall(real, fake):
    """Features (M, d), (N, d) -> precision, recall."""
    inside, reached = inside_manifolds(real, fake)
    return float(inside.mean()), float(reached.mean())


# -----------------------------------------------------------------------------
# Standard errors

BLOCKS = 20                                            # parts of the images that are left out in turn


def distance_by_block(x, y):
    """Frechet distance of features x (n, d) from y (m, d) -> (blocks,): its jackknife pseudo-values
    B D - (B - 1) D_b, where D_b lacks block b of both, every B-th image. Their mean is the distance
    without its bias, which falls as 1 / n and 1 / m, so that rows of any n compare, if n is six times
    d or more (it may so come out a little below 0); their scatter gives its standard error
    (Quenouille 1956, Tukey 1958)."""
    B = min(BLOCKS, len(x), len(y))
    x_sums = sums_by_block(x, B)
    y_sums = sums_by_block(y, B)
    x_all = sum(x_sums)
    y_all = sum(y_sums)
    whole = frechet_distance(moments_of(x_all), moments_of(y_all))
    values = []
    for x_block, y_block in zip(x_sums, y_sums):
        without = frechet_distance(moments_of(x_all - x_block), moments_of(y_all - y_block))
        values.append(B * whole - (B - 1) * without)
    return np.array(values)


def share_by_block(hits):
    """Bools (n,) -> (blocks,): the share of True in each block, every B-th image."""
    hits = np.asarray(hits, dtype=float)
    B = min(BLOCKS, len(hits))
    return np.array([hits[b::B].mean() for b in range(B)])


def standard_error(values):
    """Of the mean of independent values (B,), as blocks are."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def is_tie(a, b, key):
    """Is the difference of two rows in the measure `key` below two of its standard errors? Block
    by block, as both rows were drawn for the same captions and share a reference, whose noise so
    drops out."""
    x = np.array(a['blocks'][key])
    y = np.array(b['blocks'][key])
    if len(x) == len(y):
        error = standard_error(x - y)
    else:
        error = math.hypot(a['error'][key], b['error'][key])
    return abs(a[key] - b[key]) <= 2 * error


# -----------------------------------------------------------------------------
# What the stages measure

MANIFOLD = 2000            # images of a row behind precision and recall, which depend on their number


class Reference:
    """What the metrics compare with: the images that the data source sets apart, held-out renders
    of the shapes world or a random half of a folder (which the models were trained on too). `rest`
    are the indices of others like them, from which `prompts` takes captions and real images.
    `reader` gives the features of the distance that counts (common/reader.py); toy features are a
    second pair of eyes that was never trained."""

    def __init__(self, source, reader, n=5000):
        self.source = source
        self.reader = reader
        index, self.rest, self.name = source.reference_split(n)
        self.captions = []
        toy = []
        read = []
        n_parts = math.ceil(len(index) / 500)          # of 500; 5,000 ImageNet images take 4 GB
        for part in np.array_split(index, n_parts):
            images, captions = source.batch(part)
            toy.append(toy_features(images))
            read.append(reader.features(images))
            self.captions += captions
        self.toy = torch.cat(toy)
        self.toy_radii = radii(self.toy)
        self.read = torch.cat(read)

    @classmethod
    def of(cls, loaded, folder, n):
        """The reference of a teacher's data, None where it has none here. Its reader is in `folder`,
        made where it is missing."""
        if not loaded.data:
            return None
        return cls(loaded.source, load_reader(loaded.source, folder), n)

    def prompts(self, n):
        """n captions, none of the reference, over again where there are fewer, and the real images of
        the first of them, each once: (m, 3, H, W) with m <= n."""
        images, captions = self.source.batch(self.source.readable(self.rest, n))
        return [captions[k % len(captions)] for k in range(n)], images

    def measure(self, images, captions):
        """Images (n, 3, H, W) drawn for the captions -> dict: reader and toy_fd, two distances,
        precision, recall, accuracy (share of images that show their caption); `error`, the standard
        error of each, and `blocks`, the values by block behind it; n, reference; where captions
        fall into tasks also the accuracy of each and `tv`, the total variation distance of each
        factor. The bias of few images is taken off the reader's distance, but not off toy FD."""
        toy = toy_features(images)
        if self.source.judges:
            right = self.source.follows(images, captions)
        else:
            right = self.vote(toy, captions)
        inside, reached = inside_manifolds(self.toy, toy[:MANIFOLD], self.toy_radii)
        blocks = {
            'reader': distance_by_block(self.reader.features(images), self.read),
            'toy_fd': distance_by_block(toy, self.toy),
            'precision': share_by_block(inside),
            'recall': share_by_block(reached),
            'accuracy': share_by_block(right),
        }
        row = {key: float(values.mean()) for key, values in blocks.items()}
        row.update(toy_fd=frechet_distance(toy, self.toy), accuracy=float(right.mean()))
        row.update(precision=float(inside.mean()), recall=float(reached.mean()))
        if self.source.task_names:
            row['tasks'] = self.accuracy_by_task(right, captions)
            row['tv'] = self.source.factors(images, captions)
        row['error'] = {key: standard_error(values) for key, values in blocks.items()}
        row['blocks'] = {key: values.tolist() for key, values in blocks.items()}
        return dict(row, n=len(captions), reference=self.name)

    def vote(self, features, captions):
        """Is the label of the caption, its class or category, the commonest among the nearest
        reference images? -> bool array (n,)."""
        label_of = self.source.label_of
        labels = torch.tensor([label_of(caption) for caption in self.captions])
        wanted = torch.tensor([label_of(caption) for caption in captions])
        distance = torch.cdist(features, self.toy)
        nearest = distance.topk(min(NEIGHBOURS, len(labels)), largest=False).indices  # (n, 5)
        winners = labels[nearest].mode(1).values                                      # (n,)
        return (winners == wanted).numpy()

    def accuracy_by_task(self, right, captions):
        """Share of right images (n,) among the captions of each task, for the tasks that occur."""
        tasks = np.array(self.source.tasks(captions))
        shares = {}
        for name in self.source.task_names:
            of_task = tasks == name
            if of_task.any():
                shares[name] = float(right[of_task].mean())
        return shares


class NoReference:
    """In the place of a Reference where there is no data: captions are the prompts of the teacher,
    and what real images would tell is not known."""

    def __init__(self, loaded):
        self.loaded = loaded

    def prompts(self, n):
        return self.loaded.examples(n), None

    def measure(self, images, captions):
        unknown = dict.fromkeys(MEASURES, math.nan)
        blocks = {key: [math.nan, math.nan] for key in MEASURES}
        return dict(unknown, error=unknown, blocks=blocks, n=len(captions),
                    reference='nothing, as there are no data')


@torch.no_grad()
def render(sample, loaded, captions, seed, batch=250, decoder=None):
    """Draw n captions in batches with sample(cond, rng) -> tokens: images (n, 3, H, W) on the CPU,
    decoded by `decoder`, None being the tokenizer in float32; milliseconds per image. Image k follows
    from (seed, k). The time is that of sampling and decoding: a text encoder remembers its prompts,
    so its time would fall on the first sampler of a table alone."""
    images = []
    seconds = 0.0
    for start in range(0, len(captions), batch):
        part = captions[start:start + batch]
        cond = loaded.encode(part)
        synchronise(loaded.device)
        begin = time.time()
        rngs = image_rngs(seed, range(start, start + len(part)), loaded.device)
        tokens = sample(cond, rngs)
        images.append(decode_images(decoder or loaded.tokenizer, tokens, part))   # waits for the device
        seconds += time.time() - begin
    return torch.cat(images), seconds * 1000 / len(captions)


# -----------------------------------------------------------------------------
# The table

def print_columns(entries, rows, title=''):
    """Print one {heading: number} per entry, below `title`; nothing where they are empty."""
    if not rows[0]:
        return
    print()
    print(title.ljust(NAME_WIDTH) + ''.join(f'{name:>15s}' for name in rows[0]))
    for entry, row in zip(entries, rows):
        print(entry['name'].ljust(NAME_WIDTH) + ''.join(f'{value:15.3f}' for value in row.values()))


def print_extras(entries):
    """Print what rows hold beyond the columns of `show_table`: rewards, accuracy of each task."""
    rows = []
    for entry in entries:
        row = {key: entry[key] for key in entry if key in EXTRAS or key.startswith('held_')}
        row.update(entry.get('tasks', {}))
        rows.append(row)
    print_columns(entries, rows)


def with_error(entry, key, digits):
    """A measure of a row as '0.412 ±0.031'."""
    return f'{entry[key]:.{digits}f} ±{entry["error"][key]:.{digits}f}'


def in_short(row):
    """The line of a stage that is being trained."""
    return (f'reader {with_error(row, "reader", 2)}, toy FD {with_error(row, "toy_fd", 2)}, '
            f'followed {with_error(row, "accuracy", 3)} ({row["n"]} images)')


def compared_pairs(entries):
    """The pairs of rows that `print_ties` looks at: all of few rows; of many each with the one that
    is nearest to the real images by the reader."""
    if len(entries) <= 6:
        return list(itertools.combinations(entries, 2))
    drawn = [entry for entry in entries if entry['passes']]
    distances = [entry['reader'] for entry in drawn]
    best = drawn[int(np.argmin(distances))]
    return [(best, entry) for entry in entries if entry is not best]


def print_ties(entries):
    """Print which rows the measures cannot tell apart."""
    for key, title in (('reader', 'reader'), ('toy_fd', 'toy FD'), ('accuracy', 'followed')):
        ties = []
        for a, b in compared_pairs(entries):
            if is_tie(a, b, key):
                ties.append(f'{a["name"]} = {b["name"]}')
        print(f'ties in {title}: {"; ".join(ties) or "none"}')


def show_table(entries):
    """Print rows of measurements with their standard errors, ties, image counts and reference, then
    what else they hold."""
    print()
    print(' ' * NAME_WIDTH + 'passes  ms/image  images           reader          toy FD      precision'
          '         recall       followed')
    for entry in entries:
        line = entry['name'].ljust(NAME_WIDTH)
        line += f'{entry["passes"]:6d}{entry["ms"]:10.2f}{entry["n"]:8d}'
        line += f'{with_error(entry, "reader", 3):>17s}{with_error(entry, "toy_fd", 2):>16s}'
        for key in ('precision', 'recall', 'accuracy'):
            line += f'{with_error(entry, key, 3):>15s}'
        print(line)
    print(f'reader: distance on the features of a network that reads these images; toy FD: on random '
          f'features, whose bias falls with the images; both against {entries[0]["reference"]}; precision and recall (k = 3): '
          f'of {MANIFOLD} images at most, compare among rows of equally many; ±: one standard error')
    print_ties(entries)
    print_columns(entries, [entry.get('tv', {}) for entry in entries],
                  'TV from the known law')
    print_extras(entries)


@torch.no_grad()
def final_table(path, samplers, loaded, reference, n, seed, config):
    """Measure real images (n, if there are as many), their reconstruction by the tokenizer and every sampler of
    {name: (passes, sample(cond, rng) -> tokens)}, slow ones on a quarter; print the table and write
    path.json and path.png (16 images per row, the same captions in each column). Raises OSError
    where a file cannot be written."""
    captions, real = reference.prompts(n)
    entries, pictures = [], []
    if real is not None:
        their_own = captions[:len(real)]
        tokens = encode_images(loaded.tokenizer, real)
        rebuilt = decode_images(loaded.tokenizer, tokens, their_own)
        for name, images in {'real images': real, 'tokenizer reconstruction': rebuilt}.items():
            measured = reference.measure(images, their_own)
            entries.append(dict(name=name, passes=0, ms=0.0, **measured))
        pictures.append(real[:SHOWN])
    for name, (passes, sample) in samplers.items():
        some = captions if passes <= MANY_PASSES else captions[:max(SHOWN, n // 4)]
        drawn, ms = render(sample, loaded, some, seed)
        measured = reference.measure(drawn, some)
        entries.append(dict(name=name, passes=passes, ms=round(ms, 2), **measured))
        pictures.append(drawn[:SHOWN])
    show_table(entries)
    columns = min(len(images) for images in pictures)
    rows = torch.cat([images[:columns] for images in pictures])
    save_grid(f'{path}.png', rows, captions[:columns] * len(pictures), columns=columns)
    with writing(f'{path}.json'), open(f'{path}.json', 'w', encoding='utf-8') as file:
        json.dump(dict(config=config, rows=entries), file, indent=1)
    print(f'image seeds ({seed}, 0..{n - 1}); table: {path}.json, picture: {path}.png, '
          f'samples: python sample.py --ckpt {path}.pt')


# -----------------------------------------------------------------------------
# FID and IS

class Moments:
    """Mean and covariance of features in float64 from partial sums: `add` rows (B, d), `merge` the
    sums of all processes."""

    def __init__(self, d, device='cpu'):
        self.d = d
        self.sums = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)

    def add(self, x):
        self.sums += partial_sums(x)

    def merge(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self):
        """-> mean (d,), covariance (d, d)."""
        return moments_of(self.sums)


def inception_score(probs, split=5000):
    """exp of the mean KL(p(y | x) || p(y)) (Salimans et al. 2016) in consecutive splits of class
    probabilities (n, K), averaged over the splits, which hold `split` each or, where n is no
    multiple, equally many: a small one would have a small score. Labels must be in random order, or
    a split sees few classes."""
    scores = []
    for p in probs.double().tensor_split(max(1, len(probs) // split)):
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1)  # (split,)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def load_inception(path, device, sha256=''):
    """The TorchScript Inception network that the user names, a program -> a function of uint8
    images (B, 3, H, W) that returns features (B, 2048) and class probabilities (B, 1008); sha256 of
    the file, printed before the program runs. Raises ValueError where the file cannot be read, or
    has not the `sha256` wanted."""
    try:
        digest = file_digest(path)
    except OSError as error:
        raise ValueError(f'--inception={path}: {error.strerror}; expected inception-2015-12-05.pt, see '
                         'README.md') from None
    say(f'{path}: a program, sha256 {digest}')
    if sha256 and sha256.strip().lower() != digest:
        raise ValueError(f'--inception={path}: not run, its sha256 is {digest}, not --inception_sha256={sha256}')
    try:
        program = torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f'{path}: not readable as TorchScript ({first_line(error, 80)}); expected '
                         'inception-2015-12-05.pt, see README.md') from None
    torch.backends.cudnn.allow_tf32 = False            # FID is defined by float32 features

    def network(images):
        features = program(images, return_features=True)
        probs = program(images, no_output_bias=True)
        return features.float(), probs.float()
    return network, digest


def balanced_labels(n, K, seed):
    """n class labels (n,): one random permutation of the K classes, repeated."""
    order = torch.randperm(K, generator=rng_for(seed, 0, 'labels'))
    return order.repeat(math.ceil(n / K))[:n]


def to_uint8(images):
    """[-1, 1] -> 0..255: clip(127.5 x + 128), truncated, as Di[M]O's evaluation does."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def decode_uint8(tokenizer, tokens, captions):
    """Tokens (B, N) -> uint8 images (B, 3, H, W), which stay on the device for the next network."""
    images = []
    for start in range(0, len(tokens), tokenizer.batch):
        rows = slice(start, start + tokenizer.batch)
        decoded = tokenizer.decode(tokens[rows], captions[rows])
        images.append(to_uint8(decoded))
    return torch.cat(images)


def widths_of(network, device):
    """How many features and probabilities the network gives."""
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
    features, probs = network(blank)
    return features.shape[1], probs.shape[1]


def inception_outputs(sample, loaded, captions, network, widths, seed, batch):
    """What the network says of the images drawn for n captions, by all processes together ->
    Moments of the features, features (n, d), probabilities (n, K); widths are d and K. Batch k
    belongs to process k mod world; image i follows from (seed, i)."""
    rank, world = rank_and_world()
    n = len(captions)
    device = loaded.device
    d, K = widths
    moments = Moments(d, device)
    features = torch.zeros(n, d, device=device)
    probs = torch.zeros(n, K, device=device)
    bar = progress(n, 'samples for FID')
    for start in range(rank * batch, n, world * batch):
        stop = min(start + batch, n)
        some = captions[start:stop]
        tokens = sample(loaded.encode(some), image_rngs(seed, range(start, stop), device))
        pixels = decode_uint8(loaded.tokenizer, tokens, some)
        x, p = network(pixels)
        moments.add(x)
        features[start:stop] = x
        probs[start:stop] = p
        bar.update(min(world * batch, n - start))      # the other processes have drawn as many
    bar.close()
    moments.merge()
    if world > 1:                                      # each row is zero on all but one process
        dist.all_reduce(features)
        dist.all_reduce(probs)
    return moments, features, probs


@torch.no_grad()
def inception_metrics(sample, loaded, captions, network, reference, seed, batch):
    """FID and IS of images that sample(cond, rngs) draws for n captions, class names in random
    order -> a dict, and the features (n, d), on every process. `network` gives features and
    probabilities; `reference` is what `read_reference` returns. Fewer than 50,000 images are called
    FID@n."""
    n = len(captions)
    widths = widths_of(network, loaded.device)
    moments, features, probs = inception_outputs(
        sample, loaded, captions, network, widths, seed, batch)

    name = 'FID' if n >= 50_000 else f'FID@{n}'
    wanted = reference.mean.to(loaded.device), reference.covariance.to(loaded.device)
    row = {name: frechet_distance(moments.result(), wanted), 'IS': inception_score(probs)}
    return row, features


def late_metrics(real, fake):
    """Precision and recall of features (M, d), (n, d) as a dict, which is empty where `real` is
    None, or memory lacks: that is said."""
    if real is None:
        say('no precision and recall: the reference holds no images (arr_0)')
        return {}
    try:
        precision, recall = precision_recall(real, fake)
    except (RuntimeError, MemoryError) as error:
        say(f'no precision and recall: {first_line(error, 100)}')
        return {}
    return dict(precision=precision, recall=recall)


# -----------------------------------------------------------------------------
# The reference of FID: an npz as the ADM suite publishes it

MOST_IMAGES = 100_000                                  # in its arr_0; the suite's holds 10,000
LARGEST_SIDE = 4096                                    # pixels


@torch.no_grad()
def read_reference(path, network, device, batch):
    """mean (d,), covariance (d, d) and the network's features (M, d) of the images, None where
    there are none (arr_0), from the npz at `path`, as an object. All of it is read and checked
    here, before slow work; nothing in it is executed. Raises ValueError."""
    d, _ = widths_of(network, device)
    features = []
    try:
        with zipfile.ZipFile(path) as archive:
            mean = read_numbers(archive, 'mu.npy', (d,))
            covariance = read_numbers(archive, 'sigma.npy', (d, d))
            check_moments(mean, covariance)
            if 'arr_0.npy' in archive.namelist():
                for pixels in read_images(archive, batch):
                    features.append(network(pixels.to(device))[0])
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile,
            zlib.error) as error:
        raise ValueError(f'--ref={path}: {first_line(error, 200)}; expected an npz with mu and sigma, as the ADM suite publishes '
                         '(assets/RESULTS.md, section 10), or as --ref_from=FOLDER makes it') from None
    return SimpleNamespace(mean=mean, covariance=covariance, features=torch.cat(features) if features else None)


def open_array(archive, name):
    """An array of an open npz -> a file that stands at its numbers, shape, type. Raises ValueError
    for objects, and where there are more or fewer bytes than its header says."""
    file = archive.open(name)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f'{name} is of version {version}')
    shape, by_columns, dtype = readers[version](file)
    size = archive.getinfo(name).file_size - file.tell()
    if by_columns:
        raise ValueError(f'{name} is stored column by column; save np.ascontiguousarray of it')
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f'{name} is {shape} of {dtype} in {size} bytes, expected plain numbers')
    return file, shape, dtype


def read_numbers(archive, name, wanted):
    """-> float64 of the shape `wanted`."""
    file, shape, dtype = open_array(archive, name)
    if shape != wanted or dtype.kind != 'f':
        raise ValueError(f'{name} is {shape} of {dtype}, expected {wanted} of floats, which are the features of '
                         '--inception')
    array = np.frombuffer(file.read(), dtype).reshape(shape)
    return torch.from_numpy(array.astype(np.float64))


def check_moments(mean, covariance):
    """Raise ValueError where these are no mean and covariance."""
    if not mean.isfinite().all() or not covariance.isfinite().all():
        raise ValueError('mu or sigma is not finite')
    largest = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > 1e-4 * largest:
        raise ValueError('sigma is not symmetric')
    values = torch.linalg.eigvalsh(covariance)         # rounding may leave some just below 0
    if covariance.diagonal().min() < -1e-6 * largest or values.min() < -1e-3 * values.max().abs():
        raise ValueError('sigma has a negative variance')


def read_images(archive, batch):
    """arr_0, `batch` images at a time: uint8 (B, 3, H, W)."""
    file, shape, dtype = open_array(archive, 'arr_0.npy')
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f'arr_0 is {shape} of {dtype}, expected images: uint8 (M, H, W, 3)')
    M, H, W, _ = shape
    if not 4 <= M <= MOST_IMAGES or not 1 <= max(H, W) <= LARGEST_SIDE:
        raise ValueError(f'arr_0 is {shape}, expected 4 to {MOST_IMAGES} images of at most {LARGEST_SIDE} pixels a '
                         'side')
    for start in range(0, M, batch):
        count = min(batch, M - start)
        pixels = np.frombuffer(file.read(count * H * W * 3), np.uint8).reshape(count, H, W, 3)
        yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


@torch.no_grad()
def folder_moments(source, network, device, batch):
    """Mean and covariance of the network's features of all readable images of a source, by all
    processes together, and the numbers of these images."""
    rank, world = rank_and_world()
    d, _ = widths_of(network, device)
    moments = Moments(d, device)
    readable = torch.zeros(source.length, device=device)
    bar = progress(source.length, 'images for --ref')
    for start in range(rank * batch, source.length, world * batch):
        index = np.arange(start, min(start + batch, source.length))
        images, _ = source.batch(index)
        good = [k for k, i in enumerate(index) if not source.is_bad(i)]
        if good:
            readable[index[good]] = 1
            moments.add(network(to_uint8(images[good]).to(device))[0])
        bar.update(min(world * batch, source.length - start))
    bar.close()
    moments.merge()
    sum_over_processes(readable)
    mean, covariance = moments.result()
    return mean.cpu().numpy(), covariance.cpu().numpy(), np.flatnonzero(readable.cpu().numpy())


def folder_pixels(source, index, batch):
    """The images of a source at `index` part by part: uint8 (m, H, W, 3)."""
    for start in range(0, len(index), batch):
        images, _ = source.batch(index[start:start + batch])
        yield to_uint8(images).permute(0, 2, 3, 1).numpy()
