"""A server on this machine that answers Kaggle's client as Kaggle does, and runs what is pushed to it.

The routes, delays and refusals are those that `kaggle` 2.2.4 and 2.2.5 were seen to meet. A pushed notebook is executed with papermill in a process of its own, whose `/kaggle`-like tree holds what was uploaded and nothing
else, and which can resolve no name but this machine's.
"""
import csv
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
SHAPES = {'NvidiaTeslaT4': ['Tesla T4', 'Tesla T4'], 'NvidiaTeslaP100': ['Tesla P100-PCIE-16GB'], 'None': []}


class KaggleError(Exception):
    def __init__(self, code, message, headers=()):
        super().__init__(message)
        self.code, self.headers = code, dict(headers)


def slugify(title): return re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')


class Job(threading.Thread):
    "One session of a kernel version: queued, then a subprocess; its log and output are what the API shows."
    def __init__(self, server, kernel, version, folder, rerun=False):
        super().__init__(daemon=True)
        self.server, self.kernel, self.version, self.tree, self.rerun = server, kernel, version, folder/'kaggle', rerun
        self.status, self.failure, self.events, self.polls, self.began, self.seconds = 'QUEUED', '', [], 0, time.time(), 0.
        self.output, self.process = self.tree/'working', None

    @property
    def over(self): return self.status in ('COMPLETE', 'ERROR', 'CANCEL_ACKNOWLEDGED')

    def run(self):
        try:
            time.sleep(self.server.queue_s)
            self.mount()
            self.status, began = 'RUNNING', time.time()
            code = self.execute()
            self.seconds = time.time() - began
            self.status = 'CANCEL_ACKNOWLEDGED' if code < 0 else 'ERROR' if code else 'COMPLETE'
            self.failure = {'CANCEL_ACKNOWLEDGED': 'Your notebook was stopped because it exceeded the max allowed duration.', 'ERROR': 'Your notebook exited with a non-zero code'}.get(self.status, '')
        except Exception as e:
            self.status, self.failure = 'ERROR', f'{type(e).__name__}: {e}'
            raise
        finally: self.server.used_s += self.seconds*self.server.clock_factor if self.version['gpu'] else 0

    def mount(self):
        "Only what was uploaded and attached; an archive is unpacked into a folder of its name."
        for d in ('input', 'working', 'tmp', 'bin', 'site'): (self.tree/d).mkdir(parents=True)
        old, request = self.server.layout == 'old', self.version['request']
        for ref in request.get('datasetDataSources', []):
            versions = self.server.datasets[ref.rsplit('/', 1)[0] if ref.count('/') == 2 else ref]['versions']
            stale = self.server.stale_mounts > 0
            self.server.stale_mounts -= stale
            target = self.tree/'input'/(ref.split('/')[1] if old else f'datasets/{ref}')
            if stale:
                if len(versions) > 1: shutil.copytree(versions[-2], target)
                threading.Timer(self.server.stale_s, self.place, (versions[-1], target)).start()
            else: self.place(versions[-1], target)
        for ref in request.get('kernelDataSources', []):
            job = [v for v in self.server.kernels[ref]['versions'] if v['job'].status == 'COMPLETE'][-1]['job']
            self.place(job.output, self.tree/'input'/(ref.split('/')[1] if old else f'notebooks/{ref}'))
        for slug in request.get('competitionDataSources', []):
            part = 'hidden' if self.rerun else 'public'
            self.place(self.server.competitions[slug]/part, self.tree/'input'/(slug if old else f'competitions/{slug}'))
        for ref in request.get('modelDataSources', []):
            versions = self.server.models[ref.rsplit('/', 1)[0]]
            self.place(versions[int(ref.rsplit('/', 1)[1]) - 1], self.tree/'input'/(ref.split('/', 1)[1] if old else f'models/{ref}'))
        gpus = SHAPES.get(self.version['shape'], [])
        (self.tree/'bin'/'nvidia-smi').write_text('#!/bin/sh\n' + ''.join(f'echo "GPU {i}: {n} (UUID: GPU-{i})"\n' for i, n in enumerate(gpus)))
        (self.tree/'bin'/'nvidia-smi').chmod(0o755)

    def place(self, source, target):
        new = target.with_name(target.name + '.new')
        shutil.copytree(source, new)
        for archive in [f for f in new.rglob('*') if f.suffix in ('.zip', '.tar') and self.server.extract]:
            (zipfile.ZipFile if archive.suffix == '.zip' else tarfile.open)(archive).extractall(archive.with_suffix(''))
            archive.unlink()
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)

    def execute(self):
        keep = {k: v for k, v in os.environ.items() if k in ('LANG', 'OMP_NUM_THREADS', 'TOKENIZERS_PARALLELISM', 'HF_HUB_OFFLINE')}
        env = keep | dict(PATH=f"{self.tree/'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", HOME=str(self.tree/'tmp'), KAGGLE_KERNEL_RUN_TYPE='Batch', UNDERDOG_KAGGLE=str(self.tree), TMPDIR=str(self.tree/'tmp'),
                          PIP_TARGET=str(self.tree/'site'), PIP_NO_INDEX='1', PIP_DISABLE_PIP_VERSION_CHECK='1', PYTHONPATH=f"{HERE/'offline'}:{self.tree/'site'}", UNDERDOG_TEST_KERNEL='1', PYDEVD_DISABLE_FILE_VALIDATION='1')
        if self.rerun: env['KAGGLE_IS_COMPETITION_RERUN'] = '1'
        notebook = self.tree.parent/'pushed.ipynb'
        notebook.write_text(self.version['request']['text'])
        self.process = subprocess.Popen([sys.executable, '-m', 'papermill', str(notebook), str(self.output/'__notebook__.ipynb'), '--log-output', '--no-progress-bar'], cwd=self.output, env=env, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, start_new_session=True)
        limit = self.version['request'].get('sessionTimeoutSeconds')
        if limit: threading.Timer(limit/self.server.clock_factor, self.kill).start()
        began = time.time()
        if step := self.server.stop_at.get(self.kernel): threading.Thread(target=self.stop_at, args=(step,), daemon=True).start()
        for line in self.process.stdout: self.events.append(dict(stream_name='stderr', time=(time.time() - began)*self.server.clock_factor, data=line))
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
    "`start()` it, and the client in this process talks to it; `environment()` is for the client in another process. What goes wrong is set by its attributes."
    def __init__(self, root, user='me', key='local-test-key'):
        self.root, self.user, self.key = Path(root), user, key
        self.datasets, self.kernels, self.models, self.competitions, self.submissions, self.blobs = {}, {}, {}, {}, [], {}
        self.seen, self.faults, self.lock = [], {}, threading.RLock()
        self.processing, self.queue_s, self.layout, self.extract = 1, 0., 'new', True   # status looks until a dataset is ready, seconds in the queue, /kaggle/input as of 'new' or 'old', are archives unpacked
        self.stale_mounts, self.stale_s, self.status_lag, self.stop_at = 0, 1., 0, {}   # mounts that show the version before for stale_s; looks that show the status of the version before; {kernel: training steps}
        self.flat_listing, self.zip_downloads = False, False                             # does a listing of files leave out their folders? are downloads compressed?
        self.extra_output, self.broken_datasets = [], False                              # files that an output lists besides its own; does processing of datasets fail?
        self.used_s, self.total_s, self.slots, self.clock_factor = 0., 30*3600, 2, 1.    # of the GPU quota; seconds it counts for one of ours
        self.replace_shape, self.cut_upload, self.refuse = None, 0, ''                    # what every machine shape becomes; uploads that break off half-way; an error for every push

    # ---- life
    def start(self):
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), dict(kaggle=self)))
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        home = self.root/'home'
        (home/'.kaggle').mkdir(parents=True, exist_ok=True)
        self.before = {k: os.environ.get(k) for k in ('KAGGLE_API_ENVIRONMENT', 'KAGGLE_USERNAME', 'KAGGLE_KEY', 'KAGGLE_CONFIG_DIR', 'KAGGLE_API_TOKEN', 'HOME', 'KAGGLE_LOOPBACK', 'TMPDIR')}
        os.environ.update({k: v for k, v in self.environment().items() if k in self.before})
        os.environ.pop('KAGGLE_API_TOKEN', None)
        import kagglesdk.kaggle_env as env
        env._env_to_endpoint[env.KaggleEnv.LOCAL] = self.url
        return self

    def environment(self):
        "For a process whose client shall talk to this server."
        (self.root/'tmp').mkdir(parents=True, exist_ok=True)
        return dict({k: v for k, v in os.environ.items() if k != 'KAGGLE_API_TOKEN'}, KAGGLE_API_ENVIRONMENT='LOCALHOST', KAGGLE_USERNAME=self.user, KAGGLE_KEY=self.key, KAGGLE_CONFIG_DIR=str(self.root/'home'/'.kaggle'), HOME=str(self.root/'home'),
                    KAGGLE_LOOPBACK=self.url, PYTHONPATH=os.pathsep.join([str(HERE/'offline'), os.environ.get('PYTHONPATH', '')]), TMPDIR=str(self.root/'tmp'))

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
    StartSubmissionUpload = lambda self, r: self.StartBlobUpload(dict(name=r['fileName'], contentLength=r['contentLength']))

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
        if ref in self.datasets: return dict(status='error', error=f"The requested title \"{r['title']}\" is already in use by a dataset. Please choose another title.")
        self.datasets[ref] = dict(versions=[self._store('datasets', ref, r.get('files', []), 1)], private=r.get('isPrivate', False), polls=self.processing, title=r['title'], notes=[''])
        return dict(ref=ref, url=f'{self.url}/datasets/{ref}', status='Ok')

    def CreateDatasetVersion(self, r):
        ref, dataset = self._dataset(r)
        if dataset['polls'] > 0: raise KaggleError(403, 'The dataset is being processed')
        dataset['versions'].append(self._store('datasets', ref, r['body'].get('files', []), len(dataset['versions']) + 1))
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
        return dict(ref=ref, currentVersionNumber=self._shown(dataset), isPrivate=dataset['private'], title=dataset['title'])

    def ListDatasetFiles(self, r):
        ref, dataset = self._dataset(r)
        folder = dataset['versions'][self._shown(dataset) - 1]
        rows = []
        for f in sorted(folder.iterdir()):
            if f.suffix == '.zip' and self.extract:
                with zipfile.ZipFile(f) as z: rows += [dict(name=f'{f.stem}/{i.filename}', totalBytes=i.file_size, ref=ref) for i in z.infolist() if not i.is_dir()]
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
        if not any(k.startswith(f"{r['ownerSlug']}/{r['modelSlug']}/") or k == f"{r['ownerSlug']}/{r['modelSlug']}" for k in self.models): raise KaggleError(404, 'model not found')
        return dict(ref=f"{r['ownerSlug']}/{r['modelSlug']}", id=1)

    def CreateModel(self, r):
        self.models[f"{r['ownerSlug']}/{r['slug']}"] = []
        return dict(id=1, ref=f"{r['ownerSlug']}/{r['slug']}", url=self.url)

    def _instance(self, r):
        framework = re.sub(r'^MODEL_FRAMEWORK_', '', str(r['framework'])).lower().replace('_', '')
        return f"{r['ownerSlug']}/{r['modelSlug']}/{framework}/{r['instanceSlug']}"

    def GetModelInstance(self, r):
        if self._instance(r) not in self.models: raise KaggleError(404, 'model instance not found')
        return dict(slug=r['instanceSlug'], versionNumber=len(self.models[self._instance(r)]), id=1)

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
        if gpu and self.used_s >= self.total_s: return dict(error=QUOTA)
        if gpu and sum(v['gpu'] and not v['job'].over for k in self.kernels.values() for v in k['versions']) >= self.slots: return dict(error=SESSIONS)
        owner, slug = r['slug'].split('/')
        ref = f"{owner}/{slugify(r['newTitle']) if r.get('newTitle') and r['slug'] not in self.kernels else slug}"   # a new kernel is named by its title
        kernel = self.kernels.setdefault(ref, dict(versions=[], title=r.get('newTitle'), lag=0))
        known = dict(datasetDataSources=self.datasets, competitionDataSources=self.competitions, kernelDataSources=self.kernels, modelDataSources={f'{k}/{i + 1}' for k, v in self.models.items() for i in range(len(v))})
        dropped = {k: [s for s in r.get(k, []) if s not in v and s.rsplit('/', 1)[0] not in v] for k, v in known.items()}
        request = r | {k: [s for s in r.get(k, []) if s not in dropped[k]] for k in known}
        shape = self.replace_shape or r.get('machineShape') or ('NvidiaTeslaP100' if r.get('enableGpu') else 'None')
        version = dict(request=request, shape=shape if shape in SHAPES else 'NvidiaTeslaP100', gpu=gpu, number=len(kernel['versions']) + 1)
        version['job'] = Job(self, ref, version, self.root/'sessions'/ref/str(version['number']))
        kernel['versions'].append(version)
        kernel['lag'] = self.status_lag if len(kernel['versions']) > 1 else 0
        version['job'].start()
        return dict(ref=f'/code/{ref}', url=f'{self.url}/code/{ref}', versionNumber=version['number'], kernelId=1, **{f'invalid{k[0].upper()}{k[1:]}'.replace('DataSources', 'Sources'): v for k, v in dropped.items()})

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
        v = kernel['versions'][-1]
        return dict(metadata=dict(ref=ref, id=1, title=kernel['title'] or '', machineShape=v['shape'], dockerImage='gcr.io/kaggle-gpu-images/python@sha256:feed', currentVersionNumber=v['number'], isPrivate=v['request'].get('isPrivate', False),
                                  enableInternet=v['request'].get('enableInternet', False)), blob=dict(source=v['request']['text'], language='python', kernelType='notebook', slug=ref.split('/')[1]))

    def _log(self, job): return json.dumps(job.events)

    def ListKernelSessionOutput(self, r):
        job = self._shown_version(r, spend=True)['job']
        files = sorted(f for f in job.output.rglob('*') if f.is_file()) if job.status == 'COMPLETE' else []
        rows = [dict(url=f'{self.url}/files/{f.relative_to(self.root)}', fileName=str(f.relative_to(job.output))) for f in files] + self.extra_output
        at, size = int(r.get('pageToken') or 0), r.get('pageSize') or 20
        return dict(files=rows[at:at + size], log=self._log(job) if job.over else '', nextPageToken=str(at + size) if at + size < len(rows) else '')

    def GetAcceleratorQuotaStatistics(self, r):
        seconds = lambda s: f'{s:.0f}s'
        running = sum(3600. for k in self.kernels.values() for v in k['versions'] if v['gpu'] and not v['job'].over) 
        return dict(quotaRefreshTime='2026-11-28T00:00:00Z', gpuQuota=dict(timeUsed=seconds(self.used_s), timeReserved=seconds(running), totalTimeAllowed=seconds(self.total_s)), tpuQuota=dict(timeUsed='0s', timeReserved='0s', totalTimeAllowed='72000s'))

    # ---- submissions
    def CreateCodeSubmission(self, r):
        ref = f"{r['kernelOwner']}/{r['kernelSlug']}"
        version = self.kernels[ref]['versions'][r['kernelVersion'] - 1]
        if version['request'].get('enableInternet'): raise KaggleError(400, 'Your Notebook cannot use internet access in this competition.')
        if not (version['job'].output/r['fileName']).is_file(): raise KaggleError(400, f"{r['fileName']} is not an output of this version")
        job = Job(self, ref, version, self.root/'scored'/str(len(self.submissions)), rerun=True)
        self.submissions.append(dict(job=job, name=r['fileName'], description=r.get('submissionDescription', ''), ref=len(self.submissions) + 1, competition=r['competitionName']))
        job.start()
        return dict(message='Successfully submitted', ref=len(self.submissions))

    def _submission(self, s):
        out = dict(ref=s['ref'], fileName=s['name'], description=s['description'], status='PENDING', date='2026-11-24T00:00:00Z')
        if not s['job'].over: return out
        try:
            score = self.truth(s['job'].output/s['name'])
            if not math.isfinite(score): raise ValueError('not finite')
        except Exception as e: return out | dict(status='ERROR', errorDescription=f'Submission Scoring Error: {e}')
        return out | dict(status='COMPLETE', publicScore=f'{score:.5f}')

    def ListSubmissions(self, r): return dict(submissions=[self._submission(s) for s in reversed(self.submissions) if s['competition'] == r['competitionName']])
    def GetSubmission(self, r): return self._submission(self.submissions[r['ref'] - 1])
    def GetSubmissionLimits(self, r): return dict(numToday=len(self.submissions), numTotal=len(self.submissions), numAllowedNow=5 - len(self.submissions))


class Redirect(str): pass


class Handler(BaseHTTPRequestHandler):
    protocol_version, kaggle = 'HTTP/1.1', None

    def log_message(self, *a): pass

    def reply(self, code, body=b'', kind='application/json', headers=()):
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.send_response(code)
        for k, v in {'Content-Type': kind, 'Content-Length': str(len(body)), **dict(headers)}.items(): self.send_header(k, v)
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
                return self.reply(code, dict(code=code, message='Too many requests' if code == 429 else 'Service unavailable'), headers={'Retry-After': '0.01'} if code == 429 else {})
            if not (self.headers.get('Authorization') or '').startswith(('Basic', 'Bearer')): return self.reply(401, dict(code=401, message='Unauthenticated'))
            try: answer = getattr(k, method)(body)
            except KaggleError as e: return self.reply(e.code, dict(code=e.code, message=str(e)), headers=e.headers)
            except Exception as e: return self.reply(500, dict(code=500, message=f'{type(e).__name__}: {e}'))   # of this server
        if isinstance(answer, Redirect): return self.reply(302, headers={'Location': answer})
        self.reply(200, answer)

    def do_PUT(self):
        k, blob = self.kaggle, self.kaggle.blobs.get(self.path.split('/')[-1])
        data, where = self.rfile.read(int(self.headers.get('Content-Length') or 0)), self.headers.get('Content-Range', '')
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
            return self.reply(200, path.read_bytes(), 'application/octet-stream', {'Last-Modified': 'Mon, 23 Nov 2026 00:00:00 GMT'})
        if match := re.match(r'/api/v1/kernels/logs/stream/([^/]+)/([^/?]+)', self.path): return self.stream(k.kernels[f'{match[1]}/{match[2]}']['versions'][-1]['job'])
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
