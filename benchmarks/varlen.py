"""Attention of all spans in one launch, on a CUDA card: is it right, and what does it save beside the loop?

    python -m benchmarks.varlen [--rounds 20]

First the library's own test of the kernel for head sizes, precisions, grouped queries and windows; then the same rows
through the loop of `underdog.model.attention` and in one launch, output and gradients, for the layouts of pair and
symmetric heads and of the last layer; last the time and the number of kernels of a layer's attention, forward and
backward. Needs torch and numpy, nothing else. Without a card it says so and ends. The last line of output is JSON.
"""
import argparse
import json
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np

SHAPES = {   # heads, heads of keys, head size
    'smollm2-135m': (9, 3, 64),
    'qwen-0.6b': (16, 8, 128),
    'mistral-7b': (32, 8, 128),
    'gemma-2-9b': (16, 8, 256),
}
BATCHES = {   # tokens of prompt, A and B of every row: about 4,000 tokens a batch
    '6 rows of 680': [(80, 300, 300)]*6,
    '40 rows of 100': [(12, 44, 44)]*40,
}


# ---- plans
def plan_of(rows, head='pair'):
    "The plan of rows of (prompt, A, B) tokens: B sees the prompt; for 'symmetric' two read-outs see all."
    from underdog.text.pack import Plan, Span
    spans, positions, at = [], [], 0
    def add(n, first_position, sees=()):
        nonlocal at
        spans.append(Span(at, at + n, sees, at))
        positions.append(np.arange(first_position, first_position + n))
        at += n
    for n, a, b in rows:
        start = at
        middle, end = start + n + a, start + n + a + b
        add(n + a, 0)
        add(b, n, ((start, start + n, 0),))
        if head != 'symmetric': continue
        add(2, n + a + b, ((start, middle, 0), (middle, end, a)))
        add(2, n + a + b, ((start, start + n, 0), (middle, end, 0), (start + n, middle, b)))
    return Plan(spans, np.concatenate(positions))


def last_plan(plan):
    "The plan of the last layer: the tokens that are read are the second half of every span."
    from underdog.text.pack import read_plan
    return read_plan(plan, np.concatenate([np.arange((s.start + s.end)//2, s.end) for s in plan.spans]))


def prepared(plan, head_dim, device, attend=None):
    "`plan` with what the planner tells it."
    import torch
    plan.cache.clear()
    plan.cache['inv_freq'] = 10000.**(-torch.arange(0, head_dim, 2, device=device)/head_dim)
    plan.cache['at_once'] = attend
    return plan


# ---- one layer's attention
def tensors_of(plan, shape, device, dtype, seed=0):
    "Random query, key and value of a layer, and a gradient of its output."
    import torch
    heads, key_heads, head_dim = shape
    generator = torch.Generator(device).manual_seed(seed)
    total, asked = len(plan.positions), sum(s.end - s.start for s in plan.spans)
    random = lambda h, n: torch.randn(1, h, n, head_dim, generator=generator, device=device).to(dtype)
    qkv = [x.requires_grad_() for x in (random(heads, asked), random(key_heads, total), random(key_heads, total))]
    return qkv, random(heads, asked).transpose(1, 2)


def attention(plan, qkv, grad, window=None):
    "[output, gradients of query, key and value] of a layer's attention by `plan`."
    import torch
    from underdog.model.attention import planned_attention
    settings = dict(scaling=qkv[0].shape[-1]**-.5, sliding_window=window)
    output, _ = planned_attention(SimpleNamespace(is_causal=True), *qkv, None, plan=plan, **settings)
    return [output, *torch.autograd.grad(output, qkv, grad)]


def error_of(a, b):
    "The largest difference over the largest number."
    pairs = [(x.detach().float(), y.detach().float()) for x, y in zip(a, b)]
    return max(float((x - y).abs().max()/y.abs().max()) for x, y in pairs)


# ---- right?
def tested(device):
    "[{case, largest error, reason}] of the library's own test."
    import torch
    from underdog.model.selftest import failure, trial_errors
    from underdog.model.varlen import Sizes, aten_operators
    operators, cases = aten_operators(), []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (64, 128, 256):
            for heads, key_heads, causal, window in (
                    (8, 8, True, None), (8, 2, True, None), (8, 2, True, 32), (8, 2, True, 100), (8, 8, False, None)):
                sizes = Sizes(heads, key_heads, head_dim, causal)
                reason = failure(operators, sizes, window, device=device, dtype=dtype)
                errors = {}
                if not reason: errors = trial_errors(operators, sizes, window, device=device, dtype=dtype)
                cases.append(dict(dtype=str(dtype)[6:], head_dim=head_dim, heads=[heads, key_heads], causal=causal,
                                  window=window, error=max(errors.values(), default=None), reason=reason))
    return cases


def without_inf(device):
    "{head_dim: reason} of the test when logsumexp comes back with zeros where no query is: does this card mind?"
    import torch
    from underdog.model.selftest import failure
    from underdog.model.varlen import Operators, Sizes, aten_operators
    operators = aten_operators()
    def backward(logsumexp, **arguments):
        return operators.backward(logsumexp=logsumexp.masked_fill(logsumexp.isinf(), 0.), **arguments)
    careless = Operators(operators.forward, backward)
    return {head_dim: failure(careless, Sizes(8, 8, head_dim, True), None, device=device, dtype=torch.float16)
            for head_dim in (64, 128, 256)}


def chosen(shape, device, dtype):
    "The library's `Choice` for a shape."
    from underdog.model.selftest import choose_attention
    from underdog.model.varlen import Sizes
    return choose_attention(Sizes(*shape, causal=True), device, dtype)


def beside_loop(device, dtype):
    "{layout and shape: largest relative difference of one launch to the loop}, output and gradients."
    differences = {}
    rows = [(5, 33, 64), (0, 1, 1), (70, 129, 31), (17, 300, 2)]
    for name, shape in SHAPES.items():
        choice = chosen(shape, device, dtype)
        if choice.attend is None: continue
        for head in ('pair', 'symmetric'):
            whole = plan_of([(max(1, n), a, b) for n, a, b in rows], head)
            for layer, plan in dict(whole=whole, last=last_plan(whole)).items():
                for window in (None, 4096, 50):
                    qkv, grad = tensors_of(plan, shape, device, dtype)
                    loop = attention(prepared(plan, shape[2], device), qkv, grad, window)
                    launch = attention(prepared(plan, shape[2], device, choice.attend), qkv, grad, window)
                    differences[f'{name}, {head}, {layer} layer, window {window}'] = error_of(launch, loop)
    return differences


# ---- time
def kernels_of(run):
    "CUDA kernels that `run` starts."
    import torch
    from torch.profiler import ProfilerActivity, profile
    run()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if 'LaunchKernel' in event.key)


def milliseconds(run, rounds):
    "Median wall time of `run`, the device synchronized."
    import torch
    times = []
    for i in range(rounds + 3):   # three warm up
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3*statistics.median(times[3:])


def timed(device, dtype, rounds):
    "[{shape, batch, ms and kernels of loop and launch}] of one layer's attention, forward and backward."
    import torch
    rows = []
    for name, shape in SHAPES.items():
        choice = chosen(shape, device, dtype)
        if choice.attend is None: continue
        for batch, lengths in BATCHES.items():
            row = dict(shape=name, batch=batch)
            for way, attend in dict(loop=None, launch=choice.attend).items():
                plan = prepared(plan_of(lengths), shape[2], device, attend)
                qkv, grad = tensors_of(plan, shape, device, dtype)
                run = lambda: attention(plan, qkv, grad)
                torch.cuda.reset_peak_memory_stats(device)
                row[f'{way}_ms'] = milliseconds(run, rounds)
                row[f'{way}_peak_mb'] = torch.cuda.max_memory_allocated(device)/1e6
                row[f'{way}_kernels'] = kernels_of(run)
            row['speedup'] = row['loop_ms']/row['launch_ms']
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=20, help='timed passes of each (default 20)')
    args = parser.parse_args()
    import torch
    if not torch.cuda.is_available():
        print('skipped: no CUDA device here; run it on a card')
        return print(json.dumps(dict(skipped='no CUDA device')))
    device = torch.device('cuda:0')
    card = torch.cuda.get_device_name(device)
    print(f'{card}, torch {torch.__version__}')
    # right, and fast?
    lines = {name: attempt(lambda: chosen(shape, device, torch.float16).line) for name, shape in SHAPES.items()}
    cases = attempt(lambda: tested(device))
    for case in cases: print(json.dumps(case) if isinstance(case, dict) else case)
    differences = attempt(lambda: beside_loop(device, torch.float16))
    print('one launch beside the loop:', json.dumps(differences, indent=1))
    times = attempt(lambda: timed(device, torch.float16, args.rounds))
    careless = attempt(lambda: without_inf(device))   # last, as nobody knows what it does
    worst = max(differences.values(), default=None) if isinstance(differences, dict) else None
    failed = [case for case in cases if case['reason']] if isinstance(cases, list) else cases
    wrong = isinstance(failed, str) or any(case['window'] is None for case in failed) or not worst or not worst < 1e-2
    print(json.dumps(dict(
        card=card, torch=torch.__version__, capability=list(torch.cuda.get_device_capability(device)), chosen=lines,
        right=not wrong, failed=failed, beside_loop=worst or differences, times=times, without_inf=careless)))
    if wrong: sys.exit('one launch is not what the loop computes')


def attempt(run):
    "The result of `run`, or what it raised, as text: the rest is still worth measuring."
    try: return run()
    except Exception as e: return f'{type(e).__name__}: {e}'


if __name__ == '__main__': main()
