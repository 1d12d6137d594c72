"""Builds tiny seeded models and their tokenizer, so that tests need no downloaded weights.

The weights are random but always the same. The tokenizer is a byte-level BPE trained on the text below, with
the control tokens and the chat template of SmolLM2.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.engine.model.loader import LoadedModel, assemble

NAME = "tiny"
LAYERS = 4
CONTEXT = 1024
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TRAINING_TEXT = """
You are a tiny assistant. The user asks the assistant a question and the assistant answers the question.
Which pass over the mountains is open in May? The pass over the mountains is open all year.
How long is the drive? The drive over the pass takes three hours, and the train takes two hours.
A cache keeps the keys and the values of every token that was read, so that no token is read again.
The first token of a conversation is read once; the next turn reads the new tokens only.
Bread is made from flour, water and salt. Mix the flour and the water, wait an hour, then add the salt.
The code is 7391. What is the code? Tell me about the sea, the rivers and the old towns of the north.
def read(tokens): return [token for token in tokens if token not in cache]
"""


def tiny_chat(template: str = CHATML) -> TokenizersBackend:
    """transformers' tokenizer around the trained one, with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained_tokenizer(),
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END_OF_TEXT,
        chat_template=template,
    )


def _trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=512,
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in (END_OF_TEXT, START, END)],
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(keepends=True), trainer)
    return tokenizer


def tiny_config(chat: TokenizersBackend) -> LlamaConfig:
    """4 layers, 4 query heads, 2 KV heads of 16."""
    return LlamaConfig(
        vocab_size=len(chat),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=chat.bos_token_id,
        eos_token_id=chat.eos_token_id,
        pad_token_id=chat.pad_token_id,
    )


def seeded_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights in fp32, the same for the same config and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def tiny_model(chat: TokenizersBackend) -> PreTrainedModel:
    """The tiny Llama. It hardly ever generates a control token or half a character: its answers are readable
    nonsense of `max_tokens` tokens."""
    model = seeded_model(tiny_config(chat))
    unreadable = [i for i in range(len(chat)) if not _readable(chat, i)]
    with torch.no_grad():
        model.get_output_embeddings().weight[unreadable] = 0.0
    return model


def _readable(chat: TokenizersBackend, token: int) -> bool:
    text = str(chat.decode([token])).replace("\n", " ")
    return token not in chat.all_special_ids and "\ufffd" not in text and text.isprintable()


def tiny_loaded(*, template: str = CHATML, context: int | None = None) -> LoadedModel:
    """The tiny Llama, ready for an engine."""
    chat = tiny_chat(template)
    return assemble(tiny_model(chat), chat, NAME, context=context)


def save_tiny(folder: Path) -> Path:
    """Writes the tiny Llama as a model folder: config, safetensors, tokenizer and template."""
    chat = tiny_chat()
    tiny_model(chat).save_pretrained(folder)
    chat.save_pretrained(folder)
    return folder
