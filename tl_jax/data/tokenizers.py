"""Tokenizers of pretrained models: `tokenizer.json` as it is, or built of `vocab.txt`, or `vocab.json` and `merges.txt`.

tokenizer = open_tokenizer('hf://google-bert/bert-base-uncased')
inputs = tokenizer(['One text.', 'Another.'], 128)  # {'tokens', 'mask'}, each [2, 128]
inputs = tokenizer(['A question?'], 128, pairs=['Its answer.'])  # and 'segments', 1 in the answer
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tl_jax.errors import UserError

FILES = ('tokenizer.json', 'vocab.txt', 'vocab.json')
SHIPPED = Path(__file__).resolve().parent.parent / 'pretrained' / 'shipped'  # beside the weights, a folder for each
SENTENCEPIECE = ('spiece.model', 'spm.model', 'tokenizer.model', 'sentencepiece.bpe.model')
PADDING = ('[PAD]', '<pad>', '<|endoftext|>', '</s>')


class PretrainedTokenizer(NamedTuple):
    """A text's ids with the special tokens of its model.

    Attributes:
      tokenizer: the library's; it pads nothing.
      pad_id: fills up.
      cut: the side at which a text too long loses its tokens.
      vocabulary: number of ids.
    """

    tokenizer: tokenizers.Tokenizer
    pad_id: int
    cut: Literal['left', 'right'] = 'right'

    @property
    def vocabulary(self) -> int:
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def has_padding(self) -> bool:
        """Whether padding has a token of its own, rather than the one that ends texts."""
        return self.tokenizer.id_to_token(self.pad_id).lower() in ('[pad]', '<pad>')

    def split(self, text: str) -> list[int]:
        """The ids of a whole text, special tokens included."""
        self.tokenizer.no_truncation()
        return self.tokenizer.encode(text).ids

    def encode(self, text: str, length: int) -> np.ndarray:
        """The ids of one text: int32 [length]."""
        return self([text], length)['tokens'][0]

    def __call__(self, texts: Sequence[str], length: int, pairs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Encodes texts, cut as the model's own files say and padded at the end to `length` tokens.

        Args:
          texts: any number of them.
          length: of the arrays, special tokens included, which are never cut.
          pairs: a second text for each. Of a pair too long the longer text is cut, then both alike.

        Returns:
          `tokens` int32 [texts, length] and `mask` bool, true for what is not padding; where the model tells a pair's
          texts apart also `segments` int32: 1 in the second text, else 0.

        Raises:
          UserError: there are not as many pairs as texts, or `length` leaves no room between the special tokens.
        """
        if isinstance(texts, str):
            raise UserError('tokenizer: give a list of texts, not one')
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f'tokenizer: {len(pairs)} second texts for {len(texts)}; give each its own')
        self.check_room(length, pairs=pairs is not None)
        self.tokenizer.enable_truncation(length, direction=self.cut)
        found = self.tokenizer.encode_batch(list(texts) if pairs is None else list(zip(texts, pairs, strict=True)))
        tokens = np.full((len(found), length), self.pad_id, np.int32)
        segments = np.zeros_like(tokens)
        for row, one in enumerate(found):
            tokens[row, : len(one)] = one.ids
            segments[row, : len(one)] = one.type_ids
        lengths = np.array([len(one) for one in found], np.int32).reshape(-1, 1)
        inputs = dict(tokens=tokens, mask=np.arange(length) < lengths)
        return inputs | dict(segments=segments) if segments.any() else inputs

    def check_room(self, length: int, *, pairs: bool = False) -> None:
        """Refuses a length that the special tokens alone fill."""
        special = self.tokenizer.num_special_tokens_to_add(pairs)
        if length <= special:
            raise UserError(f'tokenizer: length={length} leaves no room between {special} special tokens; raise it')

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids])


def open_tokenizer(source: str, *, lower_case: bool | None = None, pad_token: str | None = None) -> PretrainedTokenizer:
    """Opens the tokenizer of a model.

    Args:
      source: a folder, one of its files, `shipped:NAME`, or `hf://org/repo[@revision]`: the first of `FILES` that is there.
      lower_case: for `vocab.txt`; what `tokenizer_config.json` beside it says unless given, and true if nothing does.
      pad_token: the token to fill up with; the files' own unless given, and GPT-2's `<|endoftext|>`, which has none.

    Raises:
      UserError: there is no such file, or it is not what its name says.
    """
    path = _located(str(source))
    config = _json(sibling) if (sibling := _beside(path, str(source), 'tokenizer_config.json')) else {}
    try:
        if path.name == 'vocab.txt':
            tokenizer = _wordpiece(path, config, lower_case)
        elif path.name == 'vocab.json':
            merges = _beside(path, str(source), 'merges.txt')
            if merges is None:
                raise UserError(f'{path}: there is no merges.txt beside it; fetch both')
            tokenizer = _byte_level(path, merges, config)
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except UserError:
        raise
    except Exception as error:  # The library raises no type of its own.
        raise UserError(f'{path}: not a tokenizer ({" ".join(str(error).split())[:200]}); fetch it again') from None
    if lower_case is not None and path.name != 'vocab.txt':
        raise UserError(f'tokenizer: lower_case is for vocab.txt, and {path.name} says itself; leave it out')
    pad_id = _pad_id(tokenizer, config, pad_token, path)
    tokenizer.no_padding()
    stated = (tokenizer.truncation or {}).get('direction', 'right')
    cut = config.get('truncation_side') or stated
    if cut not in ('left', 'right'):
        raise UserError(f"{path}: truncation_side is 'left' or 'right', not {cut!r:.80}; mend tokenizer_config.json")
    return PretrainedTokenizer(tokenizer, pad_id, cut)


def _wordpiece(path: Path, config: dict[str, Any], lower_case: bool | None) -> tokenizers.Tokenizer:
    """BERT's: words, then their longest known parts, by the lines of a file."""
    # Not splitlines, which takes other signs than the newline for line ends.
    lines = path.read_text('utf-8').removesuffix('\n').split('\n')
    vocabulary = {line.removesuffix('\r'): i for i, line in enumerate(lines)}
    names = {key: config.get(f'{key}_token') for key in ('unk', 'sep', 'pad', 'cls', 'mask')}
    special = {key: _content(token) or f'[{key.upper()}]' for key, token in names.items()}
    for key in ('unk', 'sep', 'cls'):
        if special[key] not in vocabulary:
            raise UserError(f'{path}: has no {special[key]}; it is not the vocabulary of a BERT')
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=special['unk']))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get('tokenize_chinese_chars', True),
        strip_accents=config.get('strip_accents'),
        lowercase=config.get('do_lower_case', True) if lower_case is None else lower_case,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in special.values() if token in vocabulary])
    cls, sep = special['cls'], special['sep']
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'{cls} $A {sep}',
        pair=f'{cls} $A {sep} $B:1 {sep}:1',
        special_tokens=[(token, vocabulary[token]) for token in (cls, sep)],
    )
    return tokenizer


def _byte_level(path: Path, merges: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's: bytes, merged by a list of pairs; RoBERTa's, whose vocabulary has `<s>` and `</s>`, with these around."""
    vocabulary = _json(path)
    model = models.BPE.from_file(str(path), str(merges))
    tokenizer = tokenizers.Tokenizer(model)
    prefix_space = bool(config.get('add_prefix_space', False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in ('<s>', '<pad>', '</s>', '<unk>', '<|endoftext|>') if token in vocabulary]
    if '<mask>' in vocabulary:
        special.append(AddedToken('<mask>', lstrip=True, special=True))
    tokenizer.add_special_tokens(special)
    if {'<s>', '</s>'} <= vocabulary.keys():
        tokenizer.post_processor = processors.RobertaProcessing(
            ('</s>', vocabulary['</s>']), ('<s>', vocabulary['<s>']), add_prefix_space=prefix_space
        )
    return tokenizer


def _pad_id(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], pad_token: str | None, path: Path) -> int:
    if pad_token is not None:
        if (found := tokenizer.token_to_id(pad_token)) is None:
            raise UserError(
                f'tokenizer: pad_token {pad_token!r:.80} is not in the vocabulary of {path}; choose another'
            )
        return found
    if tokenizer.padding:
        return tokenizer.padding['pad_id']
    # A model that pads with nothing of its own is padded with the end of its texts.
    candidates = (_content(config.get('pad_token')), *PADDING, _content(config.get('eos_token')))
    ids = (tokenizer.token_to_id(token) for token in candidates if token)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise UserError(f'{path}: names no token to pad with; give pad_token')
    return found


def _content(token: Any) -> str | None:
    """A special token of `tokenizer_config.json`: its text, or an object with it."""
    return token.get('content') if isinstance(token, dict) else token


def _located(source: str) -> Path:
    if source.startswith('hf://'):
        # Imported here: only this kind of source needs it, and it takes half a second.
        from tl_jax.pretrained import hub

        return hub.fetch(source, FILES)
    path = SHIPPED / source.removeprefix('shipped:') if source.startswith('shipped:') else Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f'tokenizer: there is no {path}; name a folder with {", ".join(FILES)}')
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        pieces = next((name for name in SENTENCEPIECE if (path / name).is_file()), None)
        hint = f"; it has {pieces}: convert it with transformers' save_pretrained" if pieces else ''
        raise UserError(f'tokenizer: {path} has none of {", ".join(FILES)}{hint}')
    return found


def _beside(path: Path, source: str, name: str) -> Path | None:
    """Another file of the same model; None if it has no such file."""
    if not source.startswith('hf://'):
        return sibling if (sibling := path.with_name(name)).is_file() else None
    from tl_jax.pretrained import hub

    try:
        return hub.fetch(f'{source.removesuffix("/" + path.name)}/{name}', ())
    except UserError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text('utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: not a JSON file ({error}); fetch it again') from None
    if not isinstance(value, dict):
        raise UserError(f'{path}: not a JSON object; fetch it again')
    return value
