"""Tiny models and tokenizers, made here: what tests and notebooks train in seconds, without a hub.

Sizes are multiples of 64, which the 4-bit kernels of a CPU want."""
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

DECODERS = ('llama', 'mistral', 'gemma2', 'qwen2')
FAMILIES = (*DECODERS, 'deberta', 'bert')
# what is packed because its twin passes the trial; the laws of packing run on them (test_families.py)
NEW_DECODERS = ('qwen3', 'gemma3', 'smollm3', 'olmo2', 'granite', 'phi3')
NEW_FAMILIES = (*NEW_DECODERS, 'modernbert', 'xlmr')

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ['<pad>', '<s>', '</s>',
           '<|im_start|>', '<|im_end|>',
           '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>',
           '[INST]', '[/INST]',
           '<start_of_turn>', '<end_of_turn>']
_TEXTS = ['What is the capital of France? It is Paris.', 'Which response is better: A, B, or are they equally good?',
          'def f(x):\n    return x + 1\n\nDone.', 'user assistant model system Prompt Response']


def make_tokenizer(folder, chat_template=None, pad=True, encoder=False, whitespace=False):
    """A byte-level BPE tokenizer in `folder`, whose path is returned.

    `encoder` gives it [CLS] and [SEP]; `whitespace` makes it lose newlines, as DeBERTa's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    # bytes in, bytes out
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if whitespace: tok.normalizer = normalizers.Replace('\n', ' ')
    # merges learnt from a few sentences
    special = ['[PAD]', '[CLS]', '[SEP]'] if encoder else SPECIAL
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(_TEXTS*3, trainer)
    # as transformers loads it
    if encoder: names = dict(cls_token='[CLS]', sep_token='[SEP]', pad_token='[PAD]')
    else: names = dict(bos_token='<s>', eos_token='</s>')
    if pad and not encoder: names['pad_token'] = '<pad>'
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **names)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


def family_config(family, **changes):
    "The transformers config of a tiny model of `family`."
    import transformers as tf
    size = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                pad_token_id=0)
    kinds = dict(llama=tf.LlamaConfig, mistral=tf.MistralConfig, gemma2=tf.Gemma2Config, qwen2=tf.Qwen2Config,
                 deberta=tf.DebertaV2Config, bert=tf.BertConfig, qwen3=tf.Qwen3Config, gemma3=tf.Gemma3TextConfig,
                 smollm3=tf.SmolLM3Config, olmo2=tf.Olmo2Config, granite=tf.GraniteConfig, phi3=tf.Phi3Config,
                 modernbert=tf.ModernBertConfig, xlmr=tf.XLMRobertaConfig)
    if family in DECODERS: size |= dict(num_key_value_heads=4)
    if family == 'gemma2': size |= dict(head_dim=16)
    if family in NEW_FAMILIES: size |= _new_family(family)
    if family == 'deberta':
        size |= dict(relative_attention=True, pos_att_type=['p2c', 'c2p'], share_att_key=True, position_buckets=16,
                     norm_rel_ebd='layer_norm', position_biased_input=False, type_vocab_size=0,
                     max_position_embeddings=64)
    return kinds[family](**size | changes)


def _new_family(family):
    "What makes a tiny model of a new `family` one of its kind, in three layers: windows of 6 tokens, grouped queries."
    kinds = ['sliding_attention', 'full_attention', 'sliding_attention']
    if family in NEW_DECODERS:
        own = dict(num_hidden_layers=3, num_key_value_heads=2)
        if family in ('qwen3', 'gemma3'): own |= dict(head_dim=32)
        if family in ('gemma3', 'phi3'): own |= dict(sliding_window=6)
        if family == 'gemma3': own |= dict(layer_types=kinds)
        if family == 'smollm3': own |= dict(no_rope_layers=[1, 0, 1])
        if family == 'phi3': own |= dict(bos_token_id=1, eos_token_id=2, rope_parameters=dict(
            rope_type='default', rope_theta=1e4, partial_rotary_factor=.75), partial_rotary_factor=.75)
        if family == 'granite': own |= dict(attention_multiplier=.1, residual_multiplier=.22, embedding_multiplier=12.)
        return own
    if family == 'modernbert':
        return dict(num_hidden_layers=3, local_attention=8, global_attn_every_n_layers=3, cls_token_id=1,
                    bos_token_id=1, sep_token_id=2, eos_token_id=2, attn_implementation='sdpa')
    return dict(num_hidden_layers=3, bos_token_id=1, eos_token_id=2)


def make_backbone(folder, family='llama', seed=0, **changes):
    "A tiny backbone with random weights in `folder`."
    from transformers import AutoModel
    torch.manual_seed(seed)
    AutoModel.from_config(family_config(family, **changes)).save_pretrained(folder)
    return Path(folder)


def make_base(folder, family='llama', **changes):
    "A tiny backbone with its tokenizer in `folder`: what a run can be trained on."
    make_backbone(folder, family, **dict(vocab_size=512, max_position_embeddings=256) | changes)
    decoder = family in DECODERS
    make_tokenizer(folder, CHATML if decoder else None, encoder=not decoder, whitespace=family == 'deberta')
    return str(folder)


def predictions(run, test_csv, out, cfg=None):
    "The table of predictions of an inference with one run."
    from underdog.inference.settings import InferConfig
    from underdog.inference.scored import predict
    predict(str(run), test_csv, out, cfg or InferConfig())
    return pd.read_parquet(Path(out)/'predictions.parquet')


def small_run(world, out, family='llama', head='pair', quantization='none', dtype='auto', session=None, **changes):
    "A run with a tiny model on the rows of the folder `world`; `session`: fields of its `SessionConfig`."
    from underdog.session import SessionConfig
    from underdog.text.prompt import PromptConfig
    from underdog.model.settings import ModelConfig
    from underdog.training.run import train
    from underdog.training.settings import TrainConfig
    model = ModelConfig(str(world/family), head=head, quantization=quantization, dtype=dtype, rank=4, dropout=0.)
    # all that is learned is said: laws of predictions would hold of a head that says nothing
    cfg = TrainConfig(**dict(n_folds=3, lr=1e-2, head_lr=1e-2, batch_rows=8, shrink='none') | changes)
    session = SessionConfig(**dict(processes=1) | (session or {}))
    return train(world/'train.csv', model, out, PromptConfig(max_length=128, min_keep=4), cfg=cfg, session=session)


def by_two_processes(code, world, folder):
    "What a script gives that two processes run: it gets the paths of the tests, of `world` and of the JSON to write."
    script, out = folder/'two.py', folder/'out.json'
    script.write_text(code)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script]
    done = subprocess.run([*command, Path(__file__).parent, world, out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())
