"""Useful tokens per CPU second of a LoRA training step: underdog's packed rows beside Hugging Face's Trainer.

    python -m benchmarks.train [--rounds 5] [--steps 6] [--quick]

The same small Llama, the same LoRA on all linear layers, 8 rows a step, fp32, one thread. Every peer takes its batches from its own sampler over a whole epoch of 57,477 rows with the lengths of
LMSYS (cut at 2,048, divided by 5); a round runs `--steps` of them, spread evenly over the sizes that occur. Counters without noise come first, then paired rounds in random order. See benchmarks/README.md.
The last line of output is JSON.
"""
import argparse
import contextlib
import io
import tempfile
import time

import numpy as np

from benchmarks.common import LAYERS, RANK, WIDTH, last_line, make_base, make_prompter, make_tokens, one_thread, paired_rounds, ratios, row_lengths, spread, table

ROWS, BUDGET, FROZEN = 8, 1024, 3
FORMAT = 4   # tokens of a row's frame


def trainer_order(lengths, strategy, folder):
    "The epoch's order of rows by the Trainer's own sampler."
    import datasets
    import torch
    from transformers import Trainer, TrainingArguments
    torch.manual_seed(0)
    args = TrainingArguments(folder, per_device_train_batch_size=ROWS, train_sampling_strategy=strategy, length_column_name='length', use_cpu=True, report_to='none')
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=datasets.Dataset.from_dict(dict(length=(lengths.sum(1) + FORMAT).tolist())))
    return np.array(list(trainer._get_train_sampler()))


def epoch_batches(order): return order[:len(order)//ROWS*ROWS].reshape(-1, ROWS)


def padded_sizes(lengths, batches):
    "Padded tokens of each batch of an epoch."
    return (lengths.sum(1) + FORMAT)[batches].max(1)*batches.shape[1]


def hf_model(base, kbit):
    "The peer's model: LoRA on a classifier, with or without the k-bit recipe (checkpointing, lower 3/8 without adapters)."
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.use_cache = False
    if kbit:
        model.is_loaded_in_4bit = True   # the recipe looks at it; the weights are fp32 on every side, so that the recipe is what is compared
        model = prepare_model_for_kbit_training(model)
        model.is_loaded_in_4bit = False
    linear = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    return get_peft_model(model, LoraConfig(task_type='SEQ_CLS', r=RANK, lora_alpha=RANK, lora_dropout=0., target_modules=linear, layers_to_transform=list(range(FROZEN if kbit else 0, LAYERS))))


class Rows:
    "The peer's dataset: prompt, A and B of a row in one sequence, in the order in which they come."
    def __init__(self, tokens):
        from underdog.text.layout import sequences
        frame = make_prompter('joint').frame
        self.items = [dict(input_ids=sequences(frame, row, 'joint')[0].ids, labels=i % 3) for i, row in enumerate(tokens)]

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


def pad(items):
    "The peer's collator: dynamic padding on the right."
    import torch
    from torch.nn.utils.rnn import pad_sequence
    ids = pad_sequence([torch.tensor(x['input_ids']) for x in items], batch_first=True)
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor([x['labels'] for x in items]))


def run_trainer(model, tokens, folder):
    "(useful tokens, CPU seconds) of the Trainer on these rows, 8 a step, from the first step's beginning to the last one's end."
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging
    logging.set_verbosity_error()
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs): times.append(time.process_time())
        def on_train_end(self, *args, **kwargs): times.append(time.process_time())
    rows = Rows(tokens)
    args = TrainingArguments(folder, per_device_train_batch_size=ROWS, num_train_epochs=1, learning_rate=1e-4, train_sampling_strategy='sequential', use_cpu=True, report_to='none', save_strategy='no',
                             logging_strategy='no', disable_tqdm=True, dataloader_pin_memory=False)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=pad, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return sum(len(x['input_ids']) for x in rows.items), times[1] - times[0]


def our_model(base, lora_layers=''):
    from underdog.model.model import ModelConfig, load_model
    return load_model(ModelConfig(base, head='joint', rank=RANK, alpha=RANK, lora_layers=lora_layers, quantization='none'))


def run_ours(model, tokens, packing='causal'):
    "(useful tokens, CPU seconds) of underdog's own loop on these rows, 8 a step in the order given; `packing` '': padded, as the control."
    from accelerate import Accelerator

    from underdog.text.source import RowSource
    from underdog.training.loop import fit
    from underdog.training.schedule import row_order
    from underdog.training.settings import TrainConfig
    from underdog.training.step import FitData, Training
    cfg = TrainConfig(batch_rows=ROWS, batch_tokens=BUDGET if packing else 10**6, lr=1e-4, head_lr=1e-4, orders='given', evaluations=1, log_every=10**6)
    source = RowSource(tokens, make_prompter('joint'), packing)
    in_order = np.argsort(row_order(len(tokens), cfg.epochs, cfg.seed))   # `fit` shuffles; so every step gets the batch that the peer's sampler drew
    data = FitData(source, np.eye(3)[np.arange(len(tokens)) % 3], None, in_order)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        fit(Training(model, data, cfg, Accelerator(cpu=True)))
        seconds = time.process_time() - start
    return int(source.lengths.sum()), seconds


def copy_lora(ours, theirs, seed=1):
    "Give both models the same LoRA weights, moved away from their start."
    import torch
    generator, named = torch.Generator().manual_seed(seed), dict(theirs.named_parameters())
    for name, p in ours.backbone.named_parameters():
        if not p.requires_grad: continue
        p.data.normal_(0, .05, generator=generator)
        named[name.replace('base_model.model.', 'base_model.model.model.', 1)].data.copy_(p.data)


def equality(base, tokens):
    "(largest difference of logits, least cosine of a gradient) between ours, packed, and the peer's, padded."
    import torch.nn.functional as F

    from underdog.model.model import adapter_parameters
    from underdog.text.source import RowSource
    ours, theirs = our_model(base), hf_model(base, kbit=False)
    copy_lora(ours, theirs)
    batch = RowSource(tokens, make_prompter('joint'), 'causal').batch([(i, False) for i in range(len(tokens))])
    padded = pad(Rows(tokens).items)
    mine, his = ours.train()(batch), theirs.train()(**{k: v for k, v in padded.items() if k != 'labels'}).logits
    for logits in (mine, his): F.cross_entropy(logits, padded['labels']).backward()
    gradients = {n.replace('base_model.model.model.', 'base_model.model.', 1): p.grad for n, p in theirs.named_parameters() if 'lora' in n}
    names = [n for n, p in ours.backbone.named_parameters() if p.requires_grad]
    cosine = min(F.cosine_similarity(p.grad.flatten(), gradients[n].flatten(), dim=0).item() for n, p in zip(names, adapter_parameters(ours)))
    return (mine - his).abs().max().item(), cosine


def counted(step):
    "(operations in linear layers, in attention) of what `step` computes."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): step()   # as batched products, which the counter tells from the layers' own
    by_kind = {str(k): v for k, v in counter.get_flop_counts()['Global'].items()}
    attention = sum(v for k, v in by_kind.items() if 'bmm' in k)
    return sum(by_kind.values()) - attention, attention


def peer_operations(model, tokens):
    "Operations for each useful token of the peer's model, padded, 8 rows a batch."
    rows = Rows(tokens)
    linear, attention = counted(lambda: [model.train()(**pad(rows.items[i:i + ROWS])).loss.backward() for i in range(0, len(rows), ROWS)])
    return (linear + attention)/sum(len(x['input_ids']) for x in rows.items)


def predicted_linear(tokens, read, frozen):
    "Operations of the linear layers of a packed step by formula: 2P forward, 2P for the gradients of inputs above the frozen layers, LoRA three times, the last layer's queries, output and MLP for `read` tokens only."
    qkvo, mlp, kv = 4*WIDTH**2, 3*4*WIDTH**2, 2*WIDTH**2
    lora_kv, lora = RANK*4*WIDTH, RANK*(8*WIDTH + 3*5*WIDTH)
    total = 0
    for layer in range(LAYERS):
        everywhere, at_read = (qkvo + mlp, 0) if layer < LAYERS - 1 else (kv, qkvo + mlp - kv)
        weights = tokens*everywhere + read*at_read
        adapters = tokens*lora if layer < LAYERS - 1 else tokens*lora_kv + read*(lora - lora_kv)
        total += 2*weights if layer < frozen else 4*weights + 6*adapters
        if layer == frozen: total -= 2*tokens*(3*WIDTH**2 + 3*RANK*WIDTH)   # nobody asks for the gradient of what enters the lowest trained layer
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5, help='paired rounds (default 5)')
    parser.add_argument('--steps', type=int, default=6, help='optimizer steps of 8 rows per side and round (default 6)')
    parser.add_argument('--quick', action='store_true', help='one round of one step, half a minute: the counters and the equality hold, the times say little')
    args = parser.parse_args()
    if args.quick: args.rounds = args.steps = 1
    one_thread()
    lengths, origin = row_lengths()
    folder = tempfile.mkdtemp()
    base, useful = make_base(folder + '/base'), lengths.sum() + FORMAT*len(lengths)
    print(f'lengths of {origin}; mean {useful/len(lengths):.0f} tokens a row')

    # ---- counters without noise
    from underdog.text.source import RowSource
    batches = {name: epoch_batches(trainer_order(lengths, name, folder)) for name in ('random', 'group_by_length')}
    sizes = {name: padded_sizes(lengths, b) for name, b in batches.items()}
    efficiency = {name: float((lengths.sum(1) + FORMAT)[batches[name]].sum()/sizes[name].sum()) for name in batches}

    def pick(policy, i):
        "Whole batches of a policy's epoch, for round `i`."
        at = spread(sizes[policy], args.steps, np.random.default_rng(100 + i))
        return make_tokens(lengths[batches[policy][np.random.default_rng(i).permutation(at)]].reshape(-1, 3), seed=i)

    def rows(i): return make_tokens(lengths[spread(lengths.sum(1), ROWS*args.steps, np.random.default_rng(200 + i))], seed=i)
    models = dict(plain=hf_model(base, False), kbit=hf_model(base, True), ours=our_model(base), frozen=our_model(base, f'{FROZEN}:'))
    source = RowSource(rows(0), make_prompter('joint'), 'causal')
    packed = [source.batch([(i, False) for i in part]) for part in source.bins(np.arange(len(source)), BUDGET)]
    real, computed = sum(len(x['input_ids']) for x in Rows(rows(0)).items), sum(b.padded for b in packed)
    (linear, attention), frozen = (counted(lambda: [models[m].train()(b).sum().backward() for b in packed]) for m in ('ours', 'frozen'))
    formula = predicted_linear(computed, len(source), FROZEN)/frozen[0]
    last_layer = predicted_linear(computed, computed, 0)/predicted_linear(computed, len(source), 0)
    mine, mine_frozen = (linear + attention)/real, sum(frozen)/real
    operations = {'Trainer, default': peer_operations(models['plain'], pick('random', 0))/mine, 'Trainer, group_by_length': peer_operations(models['plain'], pick('group_by_length', 0))/mine,
                  'Trainer, k-bit recipe': peer_operations(models['kbit'], pick('random', 0))/mine_frozen}
    for model in models.values(): model.zero_grad()
    difference, cosine = equality(base, make_tokens(lengths[spread(lengths.sum(1), ROWS, np.random.default_rng(0))], seed=1))
    table('without noise', ('counter', 'value'), [
        ('real over computed tokens, a whole epoch: Trainer, random batches', efficiency['random']), ('… group_by_length', efficiency['group_by_length']), ('… underdog', real/computed),
        *((f'operations of a useful token over ours: {k}', v) for k, v in operations.items()),
        ('… of it from computing the last layer only where it is read', last_layer),
        ('attention, share of our arithmetic', attention/(linear + attention)), ('lower 3/8 frozen: operations of the linear layers, formula over counted', formula),
        ('largest difference of logits, packed to padded, 1e-6', difference*1e6), ('least cosine of a LoRA gradient', cosine)])

    # ---- paired rounds
    results = paired_rounds({
        'underdog': lambda i: run_ours(models['ours'], rows(i)), 'underdog, lower 3/8 frozen': lambda i: run_ours(models['frozen'], rows(i)),
        'own loop, random, padded': lambda i: run_ours(models['ours'], pick('random', i), ''),
        'Trainer, default': lambda i: run_trainer(models['plain'], pick('random', i), folder), 'Trainer, group_by_length': lambda i: run_trainer(models['plain'], pick('group_by_length', i), folder),
        'Trainer, k-bit recipe': lambda i: run_trainer(models['kbit'], pick('random', i), folder)}, args.rounds)
    compared = {key: ratios(results, mine, peer) for key, mine, peer in (
        ('vs_own_loop_random', 'underdog', 'own loop, random, padded'), ('vs_trainer_default', 'underdog', 'Trainer, default'),
        ('vs_group_by_length', 'underdog', 'Trainer, group_by_length'), ('vs_kbit_recipe', 'underdog, lower 3/8 frozen', 'Trainer, k-bit recipe'))}
    table('useful tokens per CPU second, underdog over peer', ('peer', 'median', 'best of each', 'least', 'greatest'), [(k, *v.values()) for k, v in compared.items()])
    last_line(dict({k: v['median'] for k, v in compared.items()}, **{f'{k}_{m}': v[m] for m in ('min', 'max', 'best') for k, v in compared.items()}, token_efficiency=real/computed, max_logit_diff=difference,
                   min_gradient_cosine=cosine, flops_predicted_over_measured=formula, operations_over_ours=operations, last_layer_saving=last_layer, attention_share=attention/(linear + attention), rounds=args.rounds, lengths=origin))


if __name__ == '__main__': main()
