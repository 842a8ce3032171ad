"""The peers of `benchmarks.train`: Hugging Face's Trainer with its own sampler, collator, loop and LoRA; and flattened
rows, Transformers' way to do without padding."""
import time

import numpy as np

from benchmarks.common import LAYERS, RANK, make_prompter

ROWS = 8      # a step
FORMAT = 4    # tokens of a row's frame
FROZEN = 3    # lower layers without adapters, in the k-bit recipe
LINEAR = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


def trainer_order(lengths, strategy, folder):
    "The epoch's order of rows by the Trainer's own sampler."
    import datasets
    import torch
    from transformers import Trainer, TrainingArguments
    torch.manual_seed(0)
    args = TrainingArguments(folder, per_device_train_batch_size=ROWS, train_sampling_strategy=strategy,
                             length_column_name='length', use_cpu=True, report_to='none')
    rows = datasets.Dataset.from_dict(dict(length=(lengths.sum(1) + FORMAT).tolist()))
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=rows)
    return np.array(list(trainer._get_train_sampler()))


def epoch_batches(order): return order[:len(order)//ROWS*ROWS].reshape(-1, ROWS)


def padded_sizes(lengths, batches):
    "Padded tokens of each batch of an epoch."
    return (lengths.sum(1) + FORMAT)[batches].max(1)*batches.shape[1]


def hf_model(base, kbit):
    "LoRA on a classifier, with or without the k-bit recipe (gradient checkpointing, lower 3/8 without adapters)."
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.use_cache = False
    if kbit:
        # the recipe looks at this flag; the weights stay fp32, so that the recipe is what is compared
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model)
        model.is_loaded_in_4bit = False
    layers = list(range(FROZEN if kbit else 0, LAYERS))
    lora = LoraConfig(task_type='SEQ_CLS', r=RANK, lora_alpha=RANK, lora_dropout=0., target_modules=LINEAR,
                      layers_to_transform=layers)
    return get_peft_model(model, lora)


class Rows:
    "The peer's dataset: prompt, A and B of a row in one sequence, in the order in which they come."
    def __init__(self, tokens):
        from underdog.text.layout import sequences
        frame = make_prompter('joint').frame
        ids = [sequences(frame, row, 'joint')[0].ids for row in tokens]
        self.items = [dict(input_ids=x, labels=i % 3) for i, x in enumerate(ids)]

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

    @property
    def useful(self):
        "Tokens without padding."
        return sum(len(x['input_ids']) for x in self.items)


def pad(items):
    "The peer's collator: dynamic padding on the right."
    import torch
    from torch.nn.utils.rnn import pad_sequence
    ids = pad_sequence([torch.tensor(x['input_ids']) for x in items], batch_first=True)
    labels = torch.tensor([x['labels'] for x in items])
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)


def run_trainer(model, tokens, folder):
    "(useful tokens, CPU seconds) of a training by the Trainer on these rows, 8 a step."
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging
    logging.set_verbosity_error()
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs): times.append(time.process_time())
        def on_train_end(self, *args, **kwargs): times.append(time.process_time())

    # nothing but steps: no logs, no checkpoints, no bars
    args = TrainingArguments(folder, per_device_train_batch_size=ROWS, num_train_epochs=1, learning_rate=1e-4,
                             train_sampling_strategy='sequential', use_cpu=True, report_to='none', save_strategy='no',
                             logging_strategy='no', disable_tqdm=True, dataloader_pin_memory=False)
    rows = Rows(tokens)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=pad, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    begin, end = times
    return rows.useful, end - begin


# ---- flattened rows
def flatten(items):
    "(input ids (1, T), position ids (1, T), index of each row's last token, labels) of rows one after the other."
    import torch
    ids = [torch.tensor(x['input_ids']) for x in items]
    positions = torch.cat([torch.arange(len(row)) for row in ids])
    last = torch.tensor([len(row) for row in ids]).cumsum(0) - 1
    return torch.cat(ids)[None], positions[None], last, torch.tensor([x['labels'] for x in items])


def flattened_logits(model, input_ids, position_ids, last):
    """(rows, 3) of a peer's model on flattened rows.

    Where positions begin again, Transformers masks one row from another, all tokens by all tokens, for SDPA."""
    classifier = model.base_model.model
    hidden = classifier.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
    return classifier.score(hidden[0, last])


def run_flattened(model, tokens):
    "(useful tokens, CPU seconds) of a training on these rows flattened, 8 a step, by a plain loop."
    import torch
    import torch.nn.functional as F
    rows = Rows(tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    start = time.process_time()
    for i in range(0, len(rows), ROWS):
        *flat, labels = flatten(rows.items[i:i + ROWS])
        F.cross_entropy(flattened_logits(model, *flat), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.)
        optimizer.step()
        optimizer.zero_grad()
    return rows.useful, time.process_time() - start
