"""Kaggle as it really is: it shows what is old, refuses in many ways, keeps what crashed.

Whatever it does, what is submitted is what was validated, and no session is spent twice."""
import pytest
from kaggle_server import write_notebook

from underdog.core import UserError
from underdog.data.competition import LLM_FINETUNING
from underdog.kaggle.account import download
from underdog.kaggle.leaderboard import SubmitConfig, commit_and_submit
from underdog.kaggle.push import PushConfig, push_kernel
from underdog.kaggle.relay import run_relay

CPU = PushConfig(shape='', gpus=0)
SLUG = LLM_FINETUNING.slug


def pushes(server): return [path for path, _ in server.seen if path.endswith('/SaveKernel')]


def versions_of(server, slug): return len(server.kernels[f'me/{slug}']['versions'])


@pytest.fixture
def competition(server, tmp_path):
    "Takes submissions; the score is the number of the version that wrote it."
    for part in ('public', 'hidden'):
        (tmp_path/part).mkdir()
        (tmp_path/part/'test.csv').write_text('id\n1\n')
    server.add_competition(SLUG, tmp_path/'public', tmp_path/'hidden', lambda path: float(len(path.read_text())))
    return server


@pytest.fixture
def submitting(tmp_path):
    "A kernel whose submission says `p`."
    columns = ','.join(LLM_FINETUNING.submission_columns)
    cell = f'open("submission.csv", "w").write(f"{columns}\\n1,{{p}},{{.9 - p}},.1\\n")'
    return write_notebook(tmp_path/'submitting.ipynb', cell, parameters='p = 0.5')


# ---- what is read back is old
@pytest.mark.parametrize('lag', [1, 3, 10**6])
def test_the_version_that_the_push_answered_is_validated_and_submitted(competition, hub, submitting, lag):
    "The one before is what Kaggle shows for a while; the answers to both pushes differ."
    server, target = competition, SubmitConfig(SLUG)
    server.readback_lag = lag
    for version, p in ((1, '0.2'), (2, '0.3')):
        commit_and_submit(hub, target, submitting, dict(p=p), 'small-submit', CPU, say=lambda text: None)
        submitted = server.submissions[-1]['job'].version
        assert submitted['number'] == version and f'p = {p}' in submitted['request']['text']
    assert len(pushes(server)) == len(server.submissions) == 2


def test_a_lost_answer_and_a_late_read_back_are_one_push(server, hub, tmp_path):
    kernel = write_notebook(tmp_path/'k.ipynb')
    server.readback_lag = 5
    for version in (1, 2):
        server.fail('SaveKernel', 'after')
        assert push_kernel(hub, kernel, {}, 'small-kernel', settings=CPU).version == version
    assert versions_of(server, 'small-kernel') == 2


def test_the_shape_of_the_last_session_is_a_doubt_not_an_error(server, hub, tmp_path):
    server.session_shape = 'NvidiaL4'
    pushed = push_kernel(hub, write_notebook(tmp_path/'k.ipynb'), {}, 'small-kernel')
    assert 'perhaps that of the last session' in pushed.doubt
    assert server.job(pushed.ref).status == 'COMPLETE' and len(pushes(server)) == 1


def test_a_relay_meets_all_of_it_and_spends_no_session_twice(server, hub, count):
    server.hostile()
    last = run_relay(hub, 'counting', count, {}, say=lambda text: None)
    assert last.number == 3 and [versions_of(server, f'counting-{i}') for i in (1, 2, 3)] == [1, 1, 1]
    # from the ledger the same machine knows what Kaggle does not show yet
    server.kernels['me/counting-3']['readback'] = 3
    assert run_relay(hub, 'counting', count, {}, say=lambda text: None).number == 3
    assert len(pushes(server)) == 3


# ---- submissions
def test_nothing_is_pushed_where_nothing_can_be_submitted(competition, hub, submitting):
    server = competition
    def refused(why):
        with pytest.raises(UserError, match=why):
            commit_and_submit(hub, SubmitConfig(SLUG), submitting, {}, 'small-submit', CPU)
    server.closed = {SLUG}
    refused(f'takes no submissions.*2030-01-01.*kaggle.com/competitions/{SLUG}')
    server.closed, server.no_rules = set(), {SLUG}
    refused(f'rules are not accepted; see https://www.kaggle.com/competitions/{SLUG}/rules')
    server.no_rules, server.max_total = set(), 0
    refused('no day brings a new one')
    server.max_total, server.max_daily = 100, 0
    refused('works after 00:00 UTC')
    assert not pushes(server) and not server.submissions


# ---- downloads
def test_what_is_compressed_on_its_way_arrives_whole(server, hub, tmp_path):
    server.gzip = True
    (server.root/'rows.csv').write_text('a,b\n'*1000)
    for _ in range(2): download(hub, f'{server.url}/files/rows.csv', tmp_path/'rows.csv')
    assert (tmp_path/'rows.csv').read_text() == 'a,b\n'*1000
