"""
Times every stage at the four published sizes, with random weights and without any file, and prints
the table of assets/RESULTS.md: one command after the other, the most wanted ones first, until the
time is over. A row that had no time says so: ten minutes are enough for one size, or for the first
rows of all.

$ python -m common.timing                      # one GPU: ten minutes at most
$ python -m common.timing --minutes=3 --teacher=maskgit
"""
import re
import subprocess
import sys
import time

from common.run import HERE, configure

# -----------------------------------------------------------------------------
minutes = 9.5          # after which no command is running any more
teacher = ''           # only this size; '' = all four
compile = True         # each training row once more with --compile
images = 0             # images of an update in every row; 0 = those of SIZES
LIMITS = dict(minutes=0, images=0, teacher=('', 'maskgit', 'maskbit', 'maskgen', 'meissonic'))
# -----------------------------------------------------------------------------

# Images of an update, at once, in distill.py, gan.py, reward.py, tteo.py, sample.py; the teacher's many steps
SIZES = {
    'maskgit': (192, 112, 16, 16, 128, 64),
    'maskbit': (112, 64, 16, 16, 128, 64),
    'maskgen': (64, 32, 16, 16, 64, 16),
    'meissonic': (4, 2, 2, 2, 8, 64)}
LONGEST = 90           # seconds of a command
REWARD = '--w_clip=0 --w_hps=0 --w_imagereward=0 --w_clipscore=1 --clip_path=random --held_out=none'
NUMBERS = ('ms_per_step', 'images_per_s', 'share_of_peak', 'peak_memory_mb', 'network', 'decoder', 'both')


def commands(kind):
    """The commands of a size, the most wanted first."""
    distill, gan, reward, tteo, draw, steps = SIZES[kind]
    ask = f'--bench --teacher={kind} --teacher_path=random'
    rewards = f'reward.py {ask} {REWARD} --micro_batch=0 --batch_size={images or reward}'
    training = [f'distill.py {ask} --micro_batch=0 --batch_size={images or distill}',
                f'gan.py {ask} --micro_batch=0 --batch_size={images or gan}',
                f'{rewards} --grad_checkpoint=false']
    found = [f'sample.py {ask} --student --steps=1 --batch={images or draw}', *training,
             f'sample.py {ask} --steps={steps} --batch={images or draw}',
             f'tteo.py --bench --teacher={kind} --ckpt=random {REWARD} --w_pick=0 --batch={images or tteo}']
    if compile:
        found += [f'{command} --compile' for command in training]
    return [*found, f'{rewards} --grad_checkpoint',
            f'sample.py {ask} --student --steps=1 --half_decoder=false --batch={images or draw}']


def numbers_of(text):
    """What a line 'bench: ...' says, {name: number}; {} where there is none."""
    lines = re.findall(r'^bench: .*', text, re.MULTILINE)
    if not lines:
        return {}
    return {name: float(value) for name, value in re.findall(r'(\w+) (-?[\d.]+)', lines[-1])}


def run_one(command, seconds):
    """-> what the command says of itself, and in a word why not."""
    arguments = [sys.executable, *command.split()]
    try:
        done = subprocess.run(arguments, cwd=HERE, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {}, f'more than {seconds:.0f} s'
    numbers = numbers_of(done.stdout)
    if numbers:
        return numbers, ''
    last = (done.stderr.strip() or done.stdout.strip() or 'no output').splitlines()[-1]
    return {}, last[:80]


if __name__ == '__main__':
    configure(globals())
    end = time.time() + 60 * minutes
    kinds = [teacher] if teacher else list(SIZES)
    queues = [commands(kind) for kind in kinds]
    print(f'| command | {" | ".join(NUMBERS)} |')
    print('|' + '---|' * (len(NUMBERS) + 1))
    for round_of_all in zip(*queues):                  # the first of every size, then the second
        for command in round_of_all:
            left = min(LONGEST, end - time.time())
            numbers, reason = run_one(command, left) if left > 5 else ({}, 'not run: no time was left')
            cells = [f'{numbers[name]:g}' if name in numbers else '' for name in NUMBERS]
            if reason:
                cells[0] = reason
            print(f'| `{command}` | {" | ".join(cells)} |', flush=True)
