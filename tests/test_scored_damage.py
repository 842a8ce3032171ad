"A scored run with a damaged test file, sample, run or base ends with a valid submission: nobody can mend it there."
import shutil
import signal
import sys
from dataclasses import dataclass

import pandas as pd
import pytest
from conftest import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from underdog.core import UserError, read_json, write_json
from underdog.data.competition import LMSYS
from underdog.data.floors import Floors
from underdog.data.rows import read_rows
from underdog.data.submission import check_submission, wanted_ids
from underdog.inference import scored
from underdog.inference.settings import InferConfig

sys.path.insert(0, str(REPO))
from benchmarks.siege_damage import HEADERS, damaged_rows   # noqa: E402
from benchmarks.siege_scored import SAMPLES, damaged_sample   # noqa: E402

SOME = settings(max_examples=25, deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture
def in_a_scored_run(monkeypatch, tmp_path):
    "Nobody looks, and the child process is killed at once: what counts is what stands before it."
    monkeypatch.setenv('KAGGLE_IS_COMPETITION_RERUN', '1')
    monkeypatch.setattr(scored, 'launch', lambda *args, **kwargs: (-signal.SIGKILL, ''))


@dataclass
class Files:
    "What a scored run is given; tests damage it."
    folder: object
    test: object
    sample: object

    @classmethod
    def copied(cls, world, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        test, sample = (shutil.copy(world/name, folder/name) for name in ('test.csv', 'sample_submission.csv'))
        return cls(folder, test, sample)

    def submit(self, *runs, sample=True, **changes):
        "The ids of the submission of the `runs`, which is valid."
        cfg = InferConfig(sample_submission=str(self.sample) if sample else '', **changes)
        table = scored.predict(','.join(map(str, runs)), self.test, self.folder/'out', cfg)
        ids = wanted_ids(self.folder/'out'/'submission.csv')
        assert check_submission(self.folder/'out'/'submission.csv', LMSYS) == len(table) == len(ids)
        return ids


# ---- the hidden file
@SOME
@given(st.data())
def test_a_damaged_hidden_file_costs_its_rows_only(world, finished, in_a_scored_run, tmp_path, data):
    files = Files.copied(world, tmp_path/'files')
    files.test.write_bytes(data.draw(damaged_rows((world/'test.csv').read_text())))
    assert files.submit(finished.path) == wanted_ids(world/'sample_submission.csv')


def test_rows_that_are_whole_keep_the_answers_of_the_baselines(world, finished, in_a_scored_run, tmp_path):
    files = Files.copied(world, tmp_path/'files')
    files.submit(finished.path)
    whole = pd.read_csv(tmp_path/'files'/'out'/'submission.csv', index_col='id')
    table = pd.read_csv(files.test, dtype=str)
    table.loc[3, 'response_a'] = 'plain text'
    table['id'] += '.0'
    table.drop(index=5).to_csv(files.test, index=False)
    files.submit(finished.path)
    mended = pd.read_csv(tmp_path/'files'/'out'/'submission.csv', index_col='id')
    others = [int(float(i)) for k, i in enumerate(table['id']) if k not in (3, 5)]
    pd.testing.assert_frame_equal(mended.loc[others], whole.loc[others])
    # what has no row gets the class prior
    prior = Floors.load(finished.floors).predict(read_rows(world/'test.csv', labelled=False)[0])['prior'][0]
    assert mended.loc[int(float(table['id'][5]))].tolist() == pytest.approx(prior.tolist())


def test_elsewhere_each_of_these_is_an_error_with_its_row(world, finished, tmp_path):
    files = Files.copied(world, tmp_path/'files')
    table = pd.read_csv(files.test, dtype=str)
    table.loc[3, 'response_a'] = 'plain text'
    table.to_csv(files.test, index=False)
    with pytest.raises(UserError, match=r'row 4 \(id .*column response_a'): files.submit(finished.path)


@pytest.mark.parametrize('content', HEADERS)
def test_a_hidden_file_without_its_header_leaves_the_sample_with_the_prior(
    world, finished, in_a_scored_run, tmp_path, content,
):
    files = Files.copied(world, tmp_path/'files')
    files.test.write_bytes(content)
    assert files.submit(finished.path) == wanted_ids(world/'sample_submission.csv')
    files.test.unlink()
    assert files.submit(finished.path) == wanted_ids(world/'sample_submission.csv')


# ---- the sample
@pytest.mark.parametrize('change', SAMPLES)
def test_a_damaged_sample_still_says_which_ids_are_wanted(world, finished, in_a_scored_run, tmp_path, change):
    files = Files.copied(world, tmp_path/'files')
    wanted = damaged_sample(files.sample, change, wanted_ids(files.test))
    assert files.submit(finished.path) == wanted


def test_what_stands_is_kept_where_a_later_step_fails(world, finished, in_a_scored_run, tmp_path, monkeypatch):
    "Without a sample, and with ids spelled as numbers with a point: the answers of the baselines are not overwritten."
    files = Files.copied(world, tmp_path/'files')
    files.sample.unlink()
    table = pd.read_csv(files.test, dtype=str)
    table.assign(id=table['id'] + '.0').to_csv(files.test, index=False)
    def full(*args, **kwargs): raise OSError('the disk is full')
    monkeypatch.setattr(scored, '_hand_over', full)
    files.submit(finished.path, sample=False)
    assert pd.read_csv(files.folder/'out'/'submission.csv').iloc[:, 1].nunique() > 3


def test_a_sample_beside_the_test_file_is_found(world, finished, in_a_scored_run, tmp_path):
    files = Files.copied(world, tmp_path/'files')
    pd.read_csv(files.sample)[::-1].to_csv(files.sample, index=False)
    assert files.submit(finished.path, sample=False) == wanted_ids(files.sample)


# ---- runs and bases
def test_held_out_rows_without_the_best_baseline_cost_their_evidence_only(
    world, finished, in_a_scored_run, tmp_path, capsys,
):
    shutil.copytree(finished.path, tmp_path/'run')
    oof, best = pd.read_parquet(tmp_path/'run'/'oof.parquet'), finished.config['best_floor']
    oof.drop(columns=[c for c in oof if c.startswith(f'floor_{best}')]).to_parquet(tmp_path/'run'/'oof.parquet')
    files = Files.copied(world, tmp_path/'files')
    files.submit(tmp_path/'run')
    assert 'what held-out rows say is left out' in capsys.readouterr().out
    assert pd.read_csv(files.folder/'out'/'submission.csv').iloc[:, 1].nunique() > 3   # not the class prior


@SOME
@given(st.data())
def test_a_damaged_run_costs_itself_only(world, finished, joint, in_a_scored_run, tmp_path, data):
    "Any file of it gone, empty, cut, or other bytes: with a second run and alone."
    files, run = Files.copied(world, tmp_path/'files'), tmp_path/'run'
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished.path, run)
    file = run/data.draw(st.sampled_from(sorted(str(f.relative_to(run)) for f in run.rglob('*') if f.is_file())))
    how = data.draw(st.sampled_from(['gone', 'empty', 'cut', 'bytes', 'object', 'list']))
    raw = file.read_bytes()
    if how == 'gone': file.unlink()
    else: file.write_bytes(dict(empty=b'', cut=raw[:len(raw)//2], bytes=b'\0\xff'*40, object=b'{}', list=b'[1]')[how])
    runs = data.draw(st.sampled_from([(run,), (run, joint.path), (joint.path, run)]))
    assert files.submit(*runs) == wanted_ids(files.sample)


def test_of_two_runs_the_damaged_one_is_left_out_and_the_other_answers(world, finished, joint, tmp_path, monkeypatch):
    "The whole, with its child: an adapter that cannot be read is a failed job, and the baselines are there before."
    monkeypatch.setenv('KAGGLE_IS_COMPETITION_RERUN', '1')
    files, run = Files.copied(world, tmp_path/'files'), shutil.copytree(joint.path, tmp_path/'run')
    for file in (run/'adapter').glob('*.safetensors'): file.write_bytes(b'no weights')
    assert files.submit(run, finished.path) == wanted_ids(files.sample)
    summary = read_json(files.folder/'out'/'summary.json')
    assert list(summary['failed']) == [str(run)]
    assert summary['answered'][str(finished.path)] == [0, 20]


@pytest.mark.parametrize('key,value', [('competition', 'another'), ('best_floor', 'none'), ('train', {}), ('model', 7)])
def test_a_strange_setting_costs_its_run_only(world, finished, in_a_scored_run, tmp_path, key, value):
    files, run = Files.copied(world, tmp_path/'files'), shutil.copytree(finished.path, tmp_path/'run')
    write_json(run/'config.json', finished.config | {key: value})
    assert files.submit(run, finished.path) == files.submit(run) == wanted_ids(files.sample)


def test_no_run_at_all(world, in_a_scored_run, tmp_path):
    files = Files.copied(world, tmp_path/'files')
    assert files.submit(tmp_path/'none') == files.submit(world) == wanted_ids(files.sample)
