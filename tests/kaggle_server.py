"""A server on this machine that answers Kaggle's client as Kaggle does, and runs what is pushed to it.

The routes, delays and refusals are those that `kaggle` 2.2.4 and 2.2.5 were seen to meet. A pushed notebook is executed
with papermill in a process of its own, whose `/kaggle`-like tree holds what was uploaded and nothing else, and which
can resolve no name but this machine's.
"""
import csv
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUOTA = 'Maximum weekly GPU quota of 30.00 hours reached.'
SESSIONS = 'Maximum batch GPU session count of 2 reached.'
TIMEOUT = 'The session timeout exceeds the maximum of 43200 seconds.'
RULES = "You must accept this competition's rules before you'll be able to use its data."
PHONE = 'You must verify your phone number to use accelerators or the internet.'
LICENCE = 'You must consent to the license of this model before you can use it.'
SHAPES = {'NvidiaTeslaT4': ['Tesla T4', 'Tesla T4'], 'NvidiaL4': ['NVIDIA L4'], 'None': []}


class KaggleError(Exception):
    def __init__(self, code, message, headers=()):
        super().__init__(message)
        self.code, self.headers = code, dict(headers)


def slugify(title): return re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')


def write_notebook(path, *cells, parameters='n = 1'):
    "A kernel with a parameters cell and these code cells; returns its path."
    import nbformat
    first = nbformat.v4.new_code_cell(parameters, metadata=dict(tags=['parameters']))
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)]), path)
    return path


class Job(threading.Thread):
    "One session of a kernel version: queued, then a subprocess; its log and output are what the API shows."
    FAILURES = {
        'CANCEL_ACKNOWLEDGED': 'Your notebook was stopped because it exceeded the max allowed duration.',
        'ERROR': 'Your notebook exited with a non-zero code',
    }

    def __init__(self, server, kernel, version, folder, rerun=False):
        super().__init__(daemon=True)
        self.server = server
        self.kernel = kernel              # owner/slug
        self.version = version            # an entry of the kernel's versions
        self.tree = folder/'kaggle'       # what the notebook takes for /kaggle
        self.output = self.tree/'working'
        self.rerun = rerun                # is it the scored run of a submission?
        self.status = 'QUEUED'
        self.failure = ''                 # Kaggle's own message
        self.events = []                  # of the log
        self.seconds = 0.
        self.process = None

    @property
    def over(self): return self.status in ('COMPLETE', 'ERROR', 'CANCEL_ACKNOWLEDGED')

    def run(self):
        try:
            time.sleep(self.server.queue_s)
            self.mount()
            self.status = 'RUNNING'
            began = time.time()
            code = self.execute()
            self.seconds = time.time() - began
            # a negative code is a signal
            self.status = 'CANCEL_ACKNOWLEDGED' if code < 0 else 'ERROR' if code else 'COMPLETE'
            self.failure = self.FAILURES.get(self.status, '')
        except Exception as e:
            self.status, self.failure = 'ERROR', f'{type(e).__name__}: {e}'
            raise
        finally:
            if self.version['gpu']: self.server.used_s += self.seconds*self.server.clock_factor

    def mount(self):
        "Only what was uploaded and attached; an archive is unpacked into a folder of its name."
        for d in ('input', 'working', 'tmp', 'bin', 'site'): (self.tree/d).mkdir(parents=True)
        server, request = self.server, self.version['request']
        for ref in request.get('datasetDataSources', []): self.mount_dataset(ref)
        for ref in request.get('kernelDataSources', []):
            # the last that completed, which need not be the last that ran; nothing where none did
            complete = [v['job'] for v in server.kernels[ref]['versions'] if v['job'].status == 'COMPLETE']
            for job in complete[-1:]: self.place(job.output, self.mount_point('notebooks', ref), server.zip_mounts)
        for slug in request.get('competitionDataSources', []):
            part = 'hidden' if self.rerun else 'public'
            self.place(server.competitions[slug]/part, self.tree/'input'/(slug if self.old else f'competitions/{slug}'))
        for ref in request.get('modelDataSources', []):
            name, number = ref.rsplit('/', 1)
            self.place(server.models[name][int(number) - 1], self.mount_point('models', ref))
        # the driver's tool shows the GPUs of the machine's shape, by name or as a table; a machine without has none
        tool, gpus = self.tree/'bin'/'nvidia-smi', SHAPES.get(self.version['shape'], [])
        listed = ''.join(f'echo "GPU {i}: {name} (UUID: GPU-{i})"\n' for i, name in enumerate(gpus))
        queried = ''.join(f'echo "{name}, 580.0, 15360 MiB, 70.00 W, 3"\n' for name in gpus)
        tool.write_text(f'#!/bin/sh\ncase "$1" in --query*) : \n{queried};; *) : \n{listed};; esac\n')
        tool.chmod(0o755)

    @property
    def old(self): return self.server.layout == 'old'

    def mount_point(self, kind, ref):
        "Without kind and owner in the old layout."
        return self.tree/'input'/(ref.split('/', 1)[1] if self.old else f'{kind}/{ref}')

    def mount_dataset(self, ref):
        "The newest version; where mounts are stale, for a while the one before or nothing."
        versions = self.server.datasets[ref.rsplit('/', 1)[0] if ref.count('/') == 2 else ref]['versions']
        target = self.mount_point('datasets', ref)
        if self.server.stale_mounts <= 0: return self.place(versions[-1], target)
        self.server.stale_mounts -= 1
        if len(versions) > 1: shutil.copytree(versions[-2], target)
        threading.Timer(self.server.stale_s, self.place, (versions[-1], target)).start()

    def place(self, source, target, pack=None):
        """Mount what is in `source`; where it has more than `pack` files, as one archive."""
        new = target.with_name(target.name + '.new')
        if pack is not None and sum(f.is_file() for f in source.rglob('*')) > pack:
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.make_archive(str(new/'_output_'), 'zip', source)
            return new.rename(target)
        shutil.copytree(source, new)
        for archive in [f for f in new.rglob('*') if f.suffix in ('.zip', '.tar') and self.server.extract]:
            (zipfile.ZipFile if archive.suffix == '.zip' else tarfile.open)(archive).extractall(archive.with_suffix(''))
            archive.unlink()
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)

    def environment(self):
        "Nothing of this process but what keeps the tests quiet and small."
        kept = ('LANG', 'OMP_NUM_THREADS', 'TOKENIZERS_PARALLELISM', 'HF_HUB_OFFLINE')
        tree, path = self.tree, os.environ['PATH']
        env = {k: v for k, v in os.environ.items() if k in kept} | {
            'PATH': f"{tree/'bin'}:{Path(sys.executable).parent}:{path}",
            'HOME': str(tree/'tmp'),
            'TMPDIR': str(tree/'tmp'),
            'KAGGLE_KERNEL_RUN_TYPE': 'Batch',
            'UNDERDOG_KAGGLE': str(tree),
            # wheels are installed beside the machine's own packages, from no index
            'PIP_TARGET': str(tree/'site'),
            'PIP_NO_INDEX': '1',
            'PIP_DISABLE_PIP_VERSION_CHECK': '1',
            'PYTHONPATH': f"{HERE/'offline'}:{tree/'site'}",
            'UNDERDOG_TEST_KERNEL': '1',
            'PYDEVD_DISABLE_FILE_VALIDATION': '1',
        }
        if self.rerun: env['KAGGLE_IS_COMPETITION_RERUN'] = '1'
        return env

    def execute(self):
        "Run the notebook as Kaggle does, with papermill; its exit code."
        notebook = self.tree.parent/'pushed.ipynb'
        notebook.write_text(self.version['request']['text'])
        command = [sys.executable, '-m', 'papermill', str(notebook), str(self.output/'__notebook__.ipynb'),
                   '--log-output', '--no-progress-bar']
        # two notebooks that start at once on this machine may choose the same ports, and one dies before its first cell
        for _ in range(3):
            code = self.run_once(command)
            if code <= 0 or any('Executing Cell' in event['data'] for event in self.events): break
        return code

    def run_once(self, command):
        "Run the `command` and take in its log; its exit code."
        self.process = subprocess.Popen(
            command, cwd=self.output, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True)
        # who may end it before its time
        limit = self.version['request'].get('sessionTimeoutSeconds')
        if limit: threading.Timer(limit/self.server.clock_factor, self.kill).start()
        step = self.server.stop_at.get(self.kernel)
        if step: threading.Thread(target=self.stop_at, args=(step,), daemon=True).start()
        # its log
        began = time.time()
        for line in self.process.stdout:
            at = (time.time() - began)*self.server.clock_factor
            self.events.append(dict(stream_name='stderr', time=at, data=line))
        return self.process.wait()

    def stop_at(self, step):
        "Ask the training in this session to stop once it has made `step` steps."
        while self.process.poll() is None:
            for status in self.output.glob('*/status.json'):
                try: reached = json.loads(status.read_text())['step'] >= step
                except ValueError: continue
                if reached: return (status.parent/'stop').touch()
            time.sleep(.01)

    def kill(self):
        if self.process.poll() is None: os.killpg(self.process.pid, 9)


class KaggleServer:
    """`start()` it, and the client in this process talks to it; `environment()` is for the client in another process.

    What goes wrong is set by its attributes."""
    def __init__(self, root, user='me', key='local-test-key'):
        self.root, self.user, self.key = Path(root), user, key
        # what it holds
        self.datasets, self.kernels, self.models, self.competitions = {}, {}, {}, {}
        self.submissions, self.blobs = [], {}
        # requests that came, [(path, body)]; codes that the next ones get, {method: [code]}
        self.seen, self.faults, self.lock = [], {}, threading.RLock()
        # datasets
        self.processing = 1             # looks at the status until one is ready
        self.broken_datasets = False    # does their processing fail?
        self.cut_upload = 0             # uploads that break off half-way
        self.extract = True             # are archives unpacked?
        self.flat_listing = False       # does a listing of files leave out their folders?
        self.zip_downloads = False      # are downloads compressed?
        # kernels
        self.queue_s = 0.               # seconds in the queue
        self.layout = 'new'             # of /kaggle/input; or 'old'
        self.stale_mounts = 0           # mounts that show the version before …
        self.stale_s = 1.               # … for so many seconds
        self.status_lag = 0             # looks that show the status of the version before
        self.stop_at = {}               # {kernel: steps after which its training is asked to stop}
        self.extra_output = []          # files that an output lists besides its own
        self.replace_shape = None       # what every machine shape becomes
        self.refuse = ''                # an error for every push
        self.max_timeout_s = 12*3600    # of a session; more is refused
        self.zip_mounts = None          # files of an output above which it is mounted as _output_.zip
        # hostile: what is read back
        self.readback_lag = 0           # looks at a kernel that show the version before
        self.session_shape = ''         # the shape that is shown: that of some last session
        self.gzip = False               # are downloads compressed on their way?
        # hostile: what the account may not do yet
        self.phone = True               # is the phone number confirmed?
        self.no_rules = set()           # competitions whose rules are not accepted
        self.no_licence = set()         # models (owner/model) whose licence is not accepted
        self.drop_models = False        # are models left out of every push?
        # competitions
        self.max_daily, self.max_total = 5, 10**6
        self.closed = set()             # competitions that take no submissions
        self.deadline = '2030-01-01T00:00:00Z'
        self.tokens = {}                # {access token: user}
        # the GPU quota
        self.used_s = 0.
        self.total_s = 30*3600
        self.slots = 2                  # sessions at a time
        self.clock_factor = 1.          # seconds that it counts for one of ours

    def hostile(self):
        "All at once that Kaggle may do and that harms nobody who minds it."
        self.readback_lag, self.status_lag = 3, 2
        self.session_shape = 'NvidiaL4'
        self.gzip = True
        return self

    # ---- life
    def start(self):
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), dict(kaggle=self)))
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        home = self.root/'home'
        (home/'.kaggle').mkdir(parents=True, exist_ok=True)
        self.before = {name: os.environ.get(name) for name in (*self.client_environment(), 'KAGGLE_API_TOKEN')}
        os.environ.update(self.client_environment())
        os.environ.pop('KAGGLE_API_TOKEN', None)
        import kagglesdk.kaggle_env as env
        env._env_to_endpoint[env.KaggleEnv.LOCAL] = self.url
        return self

    def client_environment(self):
        "What makes Kaggle's client talk to this server, with credentials of its own."
        (self.root/'tmp').mkdir(parents=True, exist_ok=True)
        return {
            'KAGGLE_API_ENVIRONMENT': 'LOCALHOST',
            'KAGGLE_USERNAME': self.user,
            'KAGGLE_KEY': self.key,
            'KAGGLE_CONFIG_DIR': str(self.root/'home'/'.kaggle'),
            'HOME': str(self.root/'home'),
            'KAGGLE_LOOPBACK': self.url,
            'TMPDIR': str(self.root/'tmp'),
        }

    def environment(self):
        "For a process whose client shall talk to this server."
        env = {k: v for k, v in os.environ.items() if k != 'KAGGLE_API_TOKEN'} | self.client_environment()
        env['PYTHONPATH'] = os.pathsep.join([str(HERE/'offline'), os.environ.get('PYTHONPATH', '')])
        return env

    def job(self, ref, number=0):
        "The session of a version of a kernel, the newest if 0, once it is over."
        job = self.kernels[ref]['versions'][number - 1]['job']
        job.join(600)
        return job

    def stop(self):
        for kernel in self.kernels.values():
            for v in kernel['versions']:
                if v['job'].process: v['job'].kill()
        self.http.shutdown()
        for k, v in self.before.items(): os.environ.pop(k, None) if v is None else os.environ.update({k: v})

    def fail(self, method, *codes):
        "The next calls of `method` answer with these HTTP codes."
        self.faults.setdefault(method, []).extend(codes)

    def add_competition(self, slug, public, hidden, truth):
        "Folders with what kernels see when saved and when scored; `truth(submission path) -> score`."
        self.competitions[slug] = self.root/'competitions'/slug
        shutil.copytree(public, self.competitions[slug]/'public')
        shutil.copytree(hidden, self.competitions[slug]/'hidden')
        self.truth = truth

    # ---- blobs
    def StartBlobUpload(self, r):
        token = hashlib.sha256(f'{len(self.blobs)}{r}'.encode()).hexdigest()[:24]
        self.blobs[token] = dict(name=Path(r['name']).name, size=r['contentLength'], data=b'')
        return dict(token=token, createUrl=f'{self.url}/upload/{token}')
    def StartSubmissionUpload(self, r):
        return self.StartBlobUpload(dict(name=r['fileName'], contentLength=r['contentLength']))

    # ---- datasets
    def _store(self, kind, ref, files, number):
        folder = self.root/kind/ref/str(number)
        folder.mkdir(parents=True)
        for f in files:
            blob = self.blobs[f['token']]
            if len(blob['data']) != blob['size']: raise KaggleError(400, f"upload of {blob['name']} is not complete")
            (folder/blob['name']).write_bytes(blob['data'])
        return folder

    def _dataset(self, r):
        ref = f"{r['ownerSlug']}/{r['datasetSlug']}"
        if ref not in self.datasets: raise KaggleError(403, "Permission 'datasets.get' was denied")
        return ref, self.datasets[ref]

    def CreateDataset(self, r):
        ref = f"{r['ownerSlug']}/{r['slug']}"
        if ref in self.datasets:
            return dict(status='error', error=f"The requested title \"{r['title']}\" is already in use by a dataset. "
                                              'Please choose another title.')
        self.datasets[ref] = {
            'versions': [self._store('datasets', ref, r.get('files', []), 1)],
            'private': r.get('isPrivate', False),
            'polls': self.processing,
            'title': r['title'],
            'notes': [''],
        }
        return dict(ref=ref, url=f'{self.url}/datasets/{ref}', status='Ok')

    def CreateDatasetVersion(self, r):
        ref, dataset = self._dataset(r)
        if dataset['polls'] > 0: raise KaggleError(403, 'The dataset is being processed')
        number = len(dataset['versions']) + 1
        dataset['versions'].append(self._store('datasets', ref, r['body'].get('files', []), number))
        dataset['polls'] = self.processing
        dataset['notes'].append(r['body'].get('versionNotes', ''))
        return dict(ref=ref, url=f'{self.url}/datasets/{ref}', status='Ok')

    def GetDatasetStatus(self, r):
        _, dataset = self._dataset(r)
        dataset['polls'] -= 1
        if self.broken_datasets: return dict(status='FAILED')
        return dict(status='READY' if dataset['polls'] < 0 else 'BLOBS_RECEIVED')

    def _shown(self, dataset): return len(dataset['versions']) - (dataset['polls'] > 0)

    def GetDataset(self, r):
        ref, dataset = self._dataset(r)
        return {
            'ref': ref,
            'currentVersionNumber': self._shown(dataset),
            'isPrivate': dataset['private'],
            'title': dataset['title'],
        }

    def ListDatasetFiles(self, r):
        ref, dataset = self._dataset(r)
        folder = dataset['versions'][self._shown(dataset) - 1]
        rows = []
        for f in sorted(folder.iterdir()):
            if f.suffix == '.zip' and self.extract:
                with zipfile.ZipFile(f) as z: members = [i for i in z.infolist() if not i.is_dir()]
                rows += [dict(name=f'{f.stem}/{i.filename}', totalBytes=i.file_size, ref=ref) for i in members]
            else: rows.append(dict(name=f.name, totalBytes=f.stat().st_size, ref=ref))
        if self.flat_listing: rows = [r | dict(name=r['name'].split('/')[-1]) for r in rows]
        at, size = int(r.get('pageToken') or 0), r.get('pageSize') or 20
        return dict(datasetFiles=rows[at:at + size], nextPageToken=str(at + size) if at + size < len(rows) else '')

    def DownloadDataset(self, r):
        ref, dataset = self._dataset(r)
        path = dataset['versions'][self._shown(dataset) - 1]/r['fileName']
        if not path.is_file(): raise KaggleError(404, 'Not found')
        if self.zip_downloads:
            zipped = self.root/'zipped'/f'{path.name}.zip'
            zipped.parent.mkdir(exist_ok=True)
            with zipfile.ZipFile(zipped, 'w') as z: z.write(path, path.name)
            path = zipped
        return Redirect(f'{self.url}/files/{path.relative_to(self.root)}')

    # ---- models
    def GetModel(self, r):
        ref = f"{r['ownerSlug']}/{r['modelSlug']}"
        if not any(f'{k}/'.startswith(f'{ref}/') for k in self.models): raise KaggleError(404, 'model not found')
        return dict(ref=ref, id=1)

    def CreateModel(self, r):
        self.models[f"{r['ownerSlug']}/{r['slug']}"] = []
        return dict(id=1, ref=f"{r['ownerSlug']}/{r['slug']}", url=self.url)

    def _instance(self, r):
        framework = re.sub(r'^MODEL_FRAMEWORK_', '', str(r['framework'])).lower().replace('_', '')
        return f"{r['ownerSlug']}/{r['modelSlug']}/{framework}/{r['instanceSlug']}"

    def GetModelInstance(self, r):
        if self._instance(r) not in self.models: raise KaggleError(404, 'model instance not found')
        return dict(slug=r['instanceSlug'], versionNumber=len(self.models[self._instance(r)]), id=1)

    def ListModelInstanceVersionFiles(self, r):
        folder = self._model_version(r)
        return dict(files=[dict(name=f.name, size=f.stat().st_size) for f in sorted(folder.iterdir())])

    def DownloadModelInstanceVersion(self, r):
        folder = self._model_version(r)
        if f"{r['ownerSlug']}/{r['modelSlug']}" in self.no_licence: raise KaggleError(403, LICENCE)
        path = next(f for f in folder.iterdir() if not r.get('path') or f.name == r['path'])
        return Redirect(f'{self.url}/files/{path.relative_to(self.root)}')

    def _model_version(self, r):
        ref, number = self._instance(r), r.get('versionNumber', 0)
        if not 0 < number <= len(self.models.get(ref, [])): raise KaggleError(404, 'model version not found')
        return self.models[ref][number - 1]

    def CreateModelInstance(self, r):
        ref = self._instance(r | r['body'])
        self.models[ref] = [self._store('models', ref, r['body'].get('files', []), 1)]
        return dict(id=1, ref=ref, url=self.url)

    def CreateModelInstanceVersion(self, r):
        ref = self._instance(r)
        self.models[ref].append(self._store('models', ref, r['body'].get('files', []), len(self.models[ref]) + 1))
        return dict(id=1, ref=ref, url=self.url)

    # ---- kernels
    def SaveKernel(self, r):
        gpu = r.get('machineShape', '') not in ('', 'None') or r.get('enableGpu', False)
        if self.refuse: return dict(error=self.refuse)
        if not self.phone and (gpu or r.get('enableInternet')): raise KaggleError(403, PHONE)
        if r.get('sessionTimeoutSeconds', 0) > self.max_timeout_s: raise KaggleError(400, TIMEOUT)
        if gpu and self.used_s >= self.total_s: return dict(error=QUOTA)
        if gpu and self._running() >= self.slots: return dict(error=SESSIONS)
        owner, slug = r['slug'].split('/')
        # a new kernel is named by its title
        if r.get('newTitle') and r['slug'] not in self.kernels: slug = slugify(r['newTitle'])
        ref = f'{owner}/{slug}'
        kernel = self.kernels.setdefault(ref, dict(versions=[], title=r.get('newTitle'), lag=0, readback=0))
        # sources that are not there are left out
        known = {
            'datasetDataSources': self.datasets,
            'competitionDataSources': set(self.competitions) - self.no_rules,
            'kernelDataSources': self.kernels,
            'modelDataSources': {f'{k}/{i + 1}' for k, v in self._usable_models() for i in range(len(v))},
        }
        is_there = lambda source, held: source in held or source.rsplit('/', 1)[0] in held
        dropped = {k: [s for s in r.get(k, []) if not is_there(s, held)] for k, held in known.items()}
        request = r | {k: [s for s in r.get(k, []) if s not in dropped[k]] for k in known}
        shape = self.replace_shape or r.get('machineShape') or ('NvidiaTeslaT4' if r.get('enableGpu') else 'None')
        version = {
            'request': request,
            # what is retired or unknown becomes the default
            'shape': shape if shape in SHAPES else 'NvidiaTeslaT4',
            'gpu': gpu,
            'number': len(kernel['versions']) + 1,
        }
        version['job'] = Job(self, ref, version, self.root/'sessions'/ref/str(version['number']))
        kernel['versions'].append(version)
        kernel['lag'] = self.status_lag if len(kernel['versions']) > 1 else 0
        kernel['readback'] = self.readback_lag
        version['job'].start()
        field = lambda k: f'invalid{k[0].upper()}{k[1:]}'.replace('DataSources', 'Sources')
        return {
            'ref': f'/code/{ref}',
            'url': f'{self.url}/code/{ref}',
            'versionNumber': version['number'],
            'kernelId': 1,
            **{field(k): sources for k, sources in dropped.items()},
        }

    def _usable_models(self):
        if self.drop_models: return []
        return [(k, v) for k, v in self.models.items() if '/'.join(k.split('/')[:2]) not in self.no_licence]

    def _running(self):
        "Sessions that hold a GPU."
        return sum(v['gpu'] and not v['job'].over for k in self.kernels.values() for v in k['versions'])

    def _kernel(self, r):
        ref = f"{r['userName']}/{r['kernelSlug'].split('/')[0]}"
        if ref not in self.kernels: raise KaggleError(403, "Permission 'kernels.get' was denied")
        return ref, self.kernels[ref]

    def _shown_version(self, r, spend=False):
        ref, kernel = self._kernel(r)
        if r.get('versionLabel'): return kernel['versions'][int(r['versionLabel'].lstrip('v')) - 1]
        if kernel['lag'] > 0:
            kernel['lag'] -= spend
            return kernel['versions'][-2]
        return kernel['versions'][-1]

    def GetKernelSessionStatus(self, r):
        job = self._shown_version(r, spend=True)['job']
        return dict(status=job.status, **({'failureMessage': job.failure} if job.failure else {}))

    def GetKernel(self, r):
        ref, kernel = self._kernel(r)
        versions = kernel['versions']
        if kernel['readback'] > 0:
            kernel['readback'] -= 1
            versions = versions[:-1]
            if not versions: raise KaggleError(403, "Permission 'kernels.get' was denied")
        v = versions[-1]
        request = v['request']
        return {
            'metadata': {
                'ref': ref,
                'id': 1,
                'title': kernel['title'] or '',
                'machineShape': self.session_shape or v['shape'],
                'dockerImage': 'gcr.io/kaggle-gpu-images/python@sha256:feed',
                'currentVersionNumber': v['number'],
                'isPrivate': request.get('isPrivate', False),
                'enableInternet': request.get('enableInternet', False),
            },
            'blob': {
                'source': request['text'],
                'language': 'python',
                'kernelType': 'notebook',
                'slug': ref.split('/')[1],
            },
        }

    def _log(self, job): return json.dumps(job.events)

    def ListKernelSessionOutput(self, r):
        job = self._shown_version(r, spend=True)['job']
        # of the last version that ran, also when it failed
        files = sorted(f for f in job.output.rglob('*') if f.is_file()) if job.over else []
        url = lambda f: f'{self.url}/files/{f.relative_to(self.root)}'
        rows = [dict(url=url(f), fileName=str(f.relative_to(job.output))) for f in files] + self.extra_output
        at, size = int(r.get('pageToken') or 0), r.get('pageSize') or 20
        return {
            'files': rows[at:at + size],
            'log': self._log(job) if job.over else '',
            'nextPageToken': str(at + size) if at + size < len(rows) else '',
        }

    def GetAcceleratorQuotaStatistics(self, r):
        seconds = lambda s: f'{s:.0f}s'
        return {
            'quotaRefreshTime': '2026-11-28T00:00:00Z',
            'gpuQuota': {
                'timeUsed': seconds(self.used_s),
                'timeReserved': seconds(3600*self._running()),
                'totalTimeAllowed': seconds(self.total_s),
            },
            'tpuQuota': dict(timeUsed='0s', timeReserved='0s', totalTimeAllowed='72000s'),
        }

    # ---- submissions
    def CreateCodeSubmission(self, r):
        if self._limits(r)['numAllowedNow'] <= 0: raise KaggleError(400, 'No submission is left')
        if r['competitionName'] in self.closed: raise KaggleError(400, 'The competition takes no submissions')
        ref = f"{r['kernelOwner']}/{r['kernelSlug']}"
        version = self.kernels[ref]['versions'][r['kernelVersion'] - 1]
        if version['request'].get('enableInternet'):
            raise KaggleError(400, 'Your Notebook cannot use internet access in this competition.')
        if not (version['job'].output/r['fileName']).is_file():
            raise KaggleError(400, f"{r['fileName']} is not an output of this version")
        job = Job(self, ref, version, self.root/'scored'/str(len(self.submissions)), rerun=True)
        self.submissions.append({
            'job': job,
            'name': r['fileName'],
            'description': r.get('submissionDescription', ''),
            'ref': len(self.submissions) + 1,
            'competition': r['competitionName'],
        })
        job.start()
        return dict(message='Successfully submitted', ref=len(self.submissions))

    def _submission(self, s):
        out = {
            'ref': s['ref'],
            'fileName': s['name'],
            'description': s['description'],
            'status': 'PENDING',
            'date': '2026-11-24T00:00:00Z',
        }
        if not s['job'].over: return out
        try:
            score = self.truth(s['job'].output/s['name'])
            if not math.isfinite(score): raise ValueError('not finite')
        except Exception as e: return out | dict(status='ERROR', errorDescription=f'Submission Scoring Error: {e}')
        return out | dict(status='COMPLETE', publicScore=f'{score:.5f}')

    def ListSubmissions(self, r):
        own = [s for s in reversed(self.submissions) if s['competition'] == r['competitionName']]
        return dict(submissions=[self._submission(s) for s in own])

    def GetSubmission(self, r): return self._submission(self.submissions[r['ref'] - 1])

    def GetSubmissionLimits(self, r): return self._limits(r)

    def _limits(self, r):
        count = len([s for s in self.submissions if s['competition'] == r['competitionName']])
        today, ever = self.max_daily - count, self.max_total - count
        return {
            'numToday': count,
            'numTotal': count,
            'numAllowedNow': max(0, min(today, ever)),
            'limitedByTotal': ever < today,
        }

    def GetCompetition(self, r):
        slug = r['competitionName']
        if slug not in self.competitions: raise KaggleError(404, 'Not found')
        return {
            'id': 1,
            'ref': f'https://www.kaggle.com/competitions/{slug}',
            'title': slug,
            'deadline': self.deadline,
            'userHasEntered': slug not in self.no_rules,
            'maxDailySubmissions': self.max_daily,
            'submissionsDisabled': slug in self.closed,
        }

    # ---- access tokens
    def IntrospectToken(self, r):
        user = self.tokens.get(r['token'])
        return dict(active=True, username=user) if user else dict(active=False)


class Redirect(str): pass


class Handler(BaseHTTPRequestHandler):
    protocol_version, kaggle = 'HTTP/1.1', None

    def log_message(self, *a): pass

    def reply(self, code, body=b'', kind='application/json', headers=()):
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.send_response(code)
        headers = {'Content-Type': kind, 'Content-Length': str(len(body)), **dict(headers)}
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        k, method = self.kaggle, self.path.split('/')[-1]
        body = json.loads(self.rfile.read(int(self.headers.get('Content-Length') or 0)) or b'{}')
        with k.lock:
            k.seen.append((self.path, body))
            if k.faults.get(method):
                code = k.faults[method].pop(0)
                if code == 'after':   # it is done, but the answer is lost
                    getattr(k, method)(body)
                    return self.reply(503, dict(code=503, message='Service unavailable'))
                if code == 429:
                    return self.reply(429, dict(code=429, message='Too many requests'), headers={'Retry-After': '0.01'})
                return self.reply(code, dict(code=code, message='Service unavailable'))
            scheme, _, token = (self.headers.get('Authorization') or '').partition(' ')
            if method != 'IntrospectToken' and not (scheme == 'Basic' or token in k.tokens):
                return self.reply(401, dict(code=401, message='Unauthenticated'))
            try: answer = getattr(k, method)(body)
            except KaggleError as e: return self.reply(e.code, dict(code=e.code, message=str(e)), headers=e.headers)
            # an error of this server
            except Exception as e: return self.reply(500, dict(code=500, message=f'{type(e).__name__}: {e}'))
        if isinstance(answer, Redirect): return self.reply(302, headers={'Location': answer})
        self.reply(200, answer)

    def do_PUT(self):
        k, blob = self.kaggle, self.kaggle.blobs.get(self.path.split('/')[-1])
        data = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        where = self.headers.get('Content-Range', '')
        k.seen.append((self.path, dict(range=where, bytes=len(data))))
        if blob is None: return self.reply(404)
        if where.startswith('bytes */'):   # how far did it come?
            if len(blob['data']) == blob['size']: return self.reply(200)
            return self.reply(308, headers={'Range': f"bytes=0-{len(blob['data']) - 1}"} if blob['data'] else {})
        if k.cut_upload:
            k.cut_upload -= 1
            blob['data'] += data[:len(data)//2]
            return self.reply(503)
        start = int(where.split()[1].split('-')[0]) if where else 0
        blob['data'] = blob['data'][:start] + data
        self.reply(200 if len(blob['data']) == blob['size'] else 308)

    def do_GET(self):
        k = self.kaggle
        k.seen.append((self.path, None))
        if self.path.startswith('/files/'):
            path = (k.root/self.path.removeprefix('/files/').split('?')[0]).resolve()
            if not path.is_relative_to(k.root.resolve()) or not path.is_file(): return self.reply(404)
            headers, data = {'Last-Modified': 'Mon, 23 Nov 2026 00:00:00 GMT'}, path.read_bytes()
            if k.gzip: headers, data = headers | {'Content-Encoding': 'gzip'}, gzip.compress(data)
            return self.reply(200, data, 'application/octet-stream', headers)
        match = re.match(r'/api/v1/kernels/logs/stream/([^/]+)/([^/?]+)(?:\?versionLabel=v?(\d+))?', self.path)
        if match: return self.stream(k.kernels[f'{match[1]}/{match[2]}']['versions'][int(match[3] or 0) - 1]['job'])
        self.reply(404)

    def stream(self, job):
        if job.over: return self.reply(200, self.kaggle._log(job).encode(), 'application/json')
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Connection', 'close')
        self.end_headers()
        sent = 0
        try:
            while True:
                over = job.over
                for event in job.events[sent:]: self.wfile.write(f'data: {json.dumps(event)}\n\n'.encode())
                sent = len(job.events)
                self.wfile.flush()
                if over: break
                time.sleep(.05)
            self.wfile.write(b'data: END_OF_LOG\n\n')
        except OSError: pass
        self.close_connection = True


def log_loss_of(truth_csv, columns):
    "A `truth` for `add_competition`: mean log loss of a submission against the 0/1 columns of `truth_csv`."
    with open(truth_csv) as f: truth = {r['id']: [float(r[c]) for c in columns] for r in csv.DictReader(f)}
    def score(path):
        with open(path) as f: rows = {r['id']: [float(r[c]) for c in columns] for r in csv.DictReader(f)}
        if set(rows) != set(truth): raise ValueError('ids differ')
        return sum(-math.log(sum(a*b for a, b in zip(rows[i], truth[i]))) for i in truth)/len(truth)
    return score
