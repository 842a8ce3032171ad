"""The peers of `benchmarks.quality`: what else people do with a small language model, a thousand rows and a budget of
CPU seconds. Each counts all that it computes, its predictions too, but not the import of its libraries."""
import time
from dataclasses import dataclass

import numpy as np

LINEAR = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


@dataclass(frozen=True)
class Task:
    "What a peer is given: the rows that underdog learned from, and those that it predicted."
    base: str          # folder of the base model
    layers: int        # lower ones that are kept
    max_length: int    # tokens of one answer with its prompt
    train: list        # (prompt, A, B) texts of each row
    y: np.ndarray      # (n, C) their labels
    held: list         # texts of the rows to predict
    seconds: float     # CPU seconds there are


@dataclass(frozen=True)
class Answer:
    "What a peer has predicted, and what that took."
    p: np.ndarray      # (held, C)
    seconds: float
    learned: float     # rows that it has learned from; a row twice counts twice


def _tokenizer(base):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(base)
    if tok.pad_token is None: tok.pad_token = tok.eos_token
    return tok


def _cut(tok, text, most): return tok(text, add_special_tokens=False, truncation=True, max_length=most).input_ids


# ---- a fine-tuned classifier
class Classified:
    "Rows as one sequence each: prompt, A and B with a headline, cut to twice `max_length`; A and B in random order."
    def __init__(self, tok, rows, labels, max_length, rng=None):
        # a third for the prompt, as in many public notebooks; what it does not need is left to the answers
        marks = [tok(f'{mark}\n', add_special_tokens=False).input_ids for mark in ('# Prompt', '\n# A', '\n# B', '\n#')]
        room = 2*max_length - sum(map(len, marks))
        self.items = []
        for (prompt, *answers), label in zip(rows, labels):
            ids = _cut(tok, prompt, room//3)
            order = (1, 0) if rng is not None and rng.random() < .5 else (0, 1)
            whole = marks[0] + ids
            for mark, i in zip(marks[1:], order): whole += mark + _cut(tok, answers[i], (room - len(ids))//2)
            if order == (1, 0): label = (1, 0, 2)[label]
            self.items.append(dict(input_ids=whole + marks[3], labels=label))

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


def _classifier(task, pad_id):
    """LoRA of rank 16 on all linear layers of the base model, and a classifier on its last token.

    It starts at 0: the library's random start is sure of itself, and costs .4 of log loss in so short a training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(
        task.base, num_hidden_layers=task.layers, num_labels=task.y.shape[1], dtype='float32')
    model.config.pad_token_id, model.config.use_cache = pad_id, False
    model.score.weight.data.zero_()
    return get_peft_model(model, LoraConfig(task_type='SEQ_CLS', r=16, lora_alpha=32, lora_dropout=.05,
                                            target_modules=LINEAR))


def _train(model, rows, tok, steps, folder, lr):
    "So many steps of 16 rows by a `Trainer`, rows of like lengths together; the CPU times at which they ended."
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs): ends.append(time.process_time())

    args = TrainingArguments(
        folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=steps, learning_rate=lr,
        warmup_steps=max(1, steps//10), lr_scheduler_type='linear', weight_decay=.01, seed=0,
        train_sampling_strategy='group_by_length', use_cpu=True, report_to='none', save_strategy='no',
        logging_strategy='no', disable_tqdm=True, dataloader_pin_memory=False)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(tok),
                      callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return ends


def _logits(model, tok, rows):
    "(n, C) logits of `rows`, eight of like lengths at a time."
    import torch
    order = np.argsort([len(item['input_ids']) for item in rows.items])
    z = np.empty((len(rows), model.config.num_labels))
    model.eval()
    with torch.no_grad():
        for i in range(0, len(order), 8):
            part = order[i:i + 8]
            batch = tok.pad([dict(input_ids=rows[j]['input_ids']) for j in part], return_tensors='pt')
            z[part] = model(**batch).logits.float().numpy()
    return z


def trainer(task, folder, lr=2e-4):
    "The `Answer` of Hugging Face's Trainer, with as many steps as the budget allows."
    import torch
    from underdog.data.metrics import softmax
    began = time.process_time()
    torch.manual_seed(0)
    tok = _tokenizer(task.base)
    labels = task.y.argmax(1).tolist()
    rows = Classified(tok, task.train, labels, task.max_length, np.random.default_rng(0))
    held = Classified(tok, task.held, [0]*len(task.held), task.max_length)
    # how long do a step and the prediction take? a model that is thrown away tries it, at no cost
    at, tried = time.process_time(), _classifier(task, tok.pad_token_id)
    first, *_, last = ends = _train(tried, rows, tok, 4, folder, lr)
    step_s, middle = (last - first)/(len(ends) - 1), time.process_time()
    some = Classified(tok, task.held[:24], [0]*24, task.max_length)
    _logits(tried, tok, some)
    predict_s = (time.process_time() - middle)/24*len(held)
    began += time.process_time() - at
    # the training
    left = task.seconds - (time.process_time() - began) - predict_s
    steps = max(1, int(left/step_s))
    model = _classifier(task, tok.pad_token_id)
    _train(model, rows, tok, steps, folder, lr)
    p = softmax(_logits(model, tok, held))
    return Answer(p, time.process_time() - began, 16*steps)


# ---- frozen embeddings
def _embed(model, tok, texts):
    "(n, h) means of the last states of `texts`, [(prompt ids, answer ids)], sixteen of like lengths at a time."
    import torch
    order = np.argsort([len(a) + len(b) for a, b in texts])
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    with torch.no_grad():
        for i in range(0, len(order), 16):
            part = order[i:i + 16]
            batch = tok.pad([dict(input_ids=texts[j][0] + texts[j][1]) for j in part], return_tensors='pt')
            mask = batch['attention_mask'][..., None]
            states = model(**batch).last_hidden_state
            vectors[part] = ((states*mask).sum(1)/mask.sum(1)).numpy()
    return vectors


def frozen(task):
    "The `Answer` of logistic regression on frozen embeddings of both answers, each behind the prompt."
    import torch
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from transformers import AutoModel
    began = time.process_time()
    torch.manual_seed(0)
    tok = _tokenizer(task.base)
    model = AutoModel.from_pretrained(task.base, num_hidden_layers=task.layers, dtype='float32').eval()
    head = tok('\n\n', add_special_tokens=False).input_ids

    def features(rows):
        texts = []
        for prompt, *answers in rows:
            ids = _cut(tok, prompt, task.max_length//3) + head
            texts += [(ids, _cut(tok, answer, task.max_length - len(ids)) or head) for answer in answers]
        a, b = _embed(model, tok, texts).reshape(len(rows), 2, -1).swapaxes(0, 1)
        return np.hstack([a - b, a + b])

    # the held-out rows first; then as many training rows as the budget allows
    held = features(task.held)
    parts, labels = [], task.y.argmax(1)
    for i in range(0, len(task.train), 64):
        if parts and time.process_time() - began > .9*task.seconds: break
        parts.append(features(task.train[i:i + 64]))
    x = np.vstack(parts)
    fitted = make_pipeline(StandardScaler(), LogisticRegressionCV(
        Cs=np.logspace(-6, 0, 7), cv=4, scoring='neg_log_loss', max_iter=300)).fit(x, labels[:len(x)])
    p = np.zeros((len(held), task.y.shape[1]))
    p[:, fitted.classes_] = fitted.predict_proba(held)
    return Answer(p, time.process_time() - began, len(x))
