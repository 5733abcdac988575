"""The tokenizer of a language model to be trained: one that exists, or a byte-level BPE made from the text.

Byte-level BPE as GPT-2 has it: text is cut into words with their leading space, words into bytes, and the most frequent
pair of neighbours becomes a token until there are enough (Radford et al., "Language models are unsupervised multitask
learners", 2019). Every text has tokens, so nothing is unknown. <|endoftext|> (id 0) is BOS, EOS and padding.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from thresher.cache.errors import UserError
from thresher.harvest.checkpoint import bundled, tokenizer_files
from thresher.harvest.corpus import DataConfig, document_split
from thresher.harvest.documents import documents
from thresher.harvest.hub import check_on_hub
from thresher.harvest.pretraining.models import PARTIAL, move_out
from thresher.harvest.pretraining.settings import TRAIN_TOKENIZER, PretrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"


def tokenizer_at(folder: Path, config: PretrainConfig, data: DataConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`; put there first when there is none. Raises UserError for one that cannot be had."""
    from transformers import AutoTokenizer

    if not tokenizer_files(folder):
        made = _made(config, data) if config.tokenizer == TRAIN_TOKENIZER else _given(config.tokenizer)
        made.save_pretrained(folder / PARTIAL)
        move_out(folder, last="tokenizer.json")
    return AutoTokenizer.from_pretrained(folder)


def _made(config: PretrainConfig, data: DataConfig) -> "PreTrainedTokenizerBase":
    """A byte-level BPE of the training split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.n_vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(config, data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=config.context,
    )


def _texts(config: PretrainConfig, data: DataConfig) -> Iterator[str]:
    """Documents of the training split, up to a number of characters."""
    left = config.tokenizer_chars
    for document in itertools.islice(documents(data.place), data.skip_documents, None):
        if not isinstance(document, str):
            raise UserError(
                f"pretrain.tokenizer is {TRAIN_TOKENIZER!r}, but data.column {data.column!r} holds token ids; expected "
                "text to make a tokenizer from. Name the tokenizer that the ids are of."
            )
        if document_split(document, data) == "train":
            yield document[:left]
            left -= len(document)
            if left <= 0:
                return


def _given(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, without its weights."""
    from transformers import AutoTokenizer

    path = bundled(name, "", "pretrain.tokenizer") if name.startswith("bundled:") else Path(name).expanduser()
    if path.is_dir():
        if not tokenizer_files(path):
            raise UserError(
                f"pretrain.tokenizer is the directory {name!r}, which has no tokenizer files; expected tokenizer.json "
                f"or the like. Give another model, or {TRAIN_TOKENIZER!r} to have one made from the text."
            )
        return AutoTokenizer.from_pretrained(path)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # it is not here, or not all of it: ask the hub, whose answer is worth a message
        check_on_hub("model", name, None, "pretrain.tokenizer")
        return AutoTokenizer.from_pretrained(name)
