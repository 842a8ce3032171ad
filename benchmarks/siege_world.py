"""What every attack of the siege starts from: a small competition, two trained runs, cases by a seed, counts."""
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import make_world
from benchmarks.siege_fork import do

# what may be counted of a kind of attack; all but the first three should stay 0
COUNTS = ('tried', 'answered_well', 'kills', 'tracebacks', 'hangs', 'missed_submissions', 'lost_runs',
          'refused_folders', 'orphans', 'half_written', 'dishonest', 'leaks', 'refused_harmless')


@dataclass
class Kind:
    "The counts of one kind of attack, and a line for each case that was not answered well."
    name: str
    counts: Counter = field(default_factory=Counter)
    faults: list = field(default_factory=list)

    def note(self, what, faults, ended=None):
        "Count a case: `faults` are names of `COUNTS`; `ended` is the `Ended` that shows what was said."
        self.counts['tried'] += 1
        self.counts['answered_well'] += not faults
        self.counts.update(faults)
        if self.counts['tried'] % 10 == 0: print(f'{self.name}: {dict(self.counts)}', flush=True)
        if not faults: return
        self.faults.append(f"{self.name} {self.counts['tried']}: {', '.join(faults)}: {what}")
        print(self.faults[-1], flush=True)
        if ended: print('    ' + '\n    '.join(ended.text.strip().splitlines()[-12:]), flush=True)

    def figures(self): return {name: self.counts[name] for name in COUNTS}


def drawn(strategy, n, seed):
    "At most `n` examples of a hypothesis strategy, the same for the same `seed`."
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    cases = []
    @seeded(seed)
    @settings(max_examples=n, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(case): cases.append(case)
    collect()
    return cases[:n]


@dataclass(frozen=True)
class World:
    "A folder with data/, base/, other/ (another base), pair/ and joint/ (finished runs)."
    folder: Path

    test = property(lambda self: self.folder/'data'/'test.csv')
    sample = property(lambda self: self.folder/'data'/'sample_submission.csv')
    train = property(lambda self: self.folder/'data'/'train.csv')
    base = property(lambda self: self.folder/'base')
    log = property(lambda self: self.folder/'log.txt')

    @classmethod
    def make(cls, folder):
        "Everything is made in children, as this process is to stay without threads."
        world = cls(Path(folder))
        if (world.folder/'joint'/'adapter').exists(): return world   # it was kept
        world.folder.mkdir(parents=True, exist_ok=True)
        for work in (world._make_rows, lambda: world.learn(world.folder/'pair'),
                     lambda: world.learn(world.folder/'joint', head='joint')):
            ended = do(work, world.log, limit_s=300.)
            if ended.code: raise SystemExit(f'the world could not be made:\n{ended.text[-3000:]}')
        return world

    def _make_rows(self):
        make_world(self.folder, n_train=60, n_test=20)
        make_world(self.folder/'another', n_train=20, n_test=1, seed=1)
        (self.folder/'another'/'base').rename(self.folder/'other')

    def learn(self, out, head='pair', epochs=1., save_minutes=.005, **changes):
        "A training of seconds, with a checkpoint every .3 seconds."
        from underdog.model.settings import ModelConfig
        from underdog.session import SessionConfig
        from underdog.text.prompt import PromptConfig
        from underdog.training.run import train
        from underdog.training.settings import TrainConfig
        cfg = TrainConfig(**dict(n_folds=3, epochs=epochs, batch_rows=4, lr=1e-2, head_lr=1e-2, probe_rows=0) | changes)
        session = SessionConfig(processes=1, save_minutes=save_minutes)
        model = ModelConfig(str(self.base), head=head, rank=4, quantization='none', dropout=0.)
        return train(self.train, model, out, PromptConfig(max_length=96, min_keep=4), cfg=cfg, session=session)


def dump(value):
    "A case in a line of at most 300 characters, what is short first."
    if isinstance(value, dict): value = dict(sorted(value.items(), key=lambda item: len(str(item[1]))))
    text = json.dumps(value, default=lambda raw: raw.decode('latin-1') if isinstance(raw, bytes) else str(raw))
    return text if len(text) < 300 else f'{text[:297]}…'
