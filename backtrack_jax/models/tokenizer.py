"""Text to token ids and back, with the character span of every token.

One BPE tokenizer, byte-level or SentencePiece's (`spelling`), read from a Hugging Face folder or, byte-level, from a
GGUF file with the `tokenizers` library alone: recent `transformers` replace the pre-tokenizer of the R1 distills and
lose every space. Nothing here adds a special token on its own; prompts, with their single beginning-of-sequence (BOS)
token, are built in `prompts.py`.

Markers. Added tokens such as `<think>` are control tokens even where a tokenizer flags them `special=False`, as R1 does
with its turn and think tokens. They are called *markers* here: every added token except those that are plain text
(runs of white space, single characters). Text from outside is encoded with `markers=False`, so that a problem that
quotes `<｜Assistant｜>` stays text.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import numpy as np
import tokenizers
from gguf import GGUFReader, TokenType
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from backtrack_jax.files.malformed import named
from backtrack_jax.files.paths import local_path
from backtrack_jax.models.spelling import spelling_of

Span = tuple[int, int]

# Put inside a marker that stands in outside text while a chat template renders it, so that it does not match. A Unicode
# noncharacter: reserved for use inside a program, never part of text that is exchanged.
_SHIELD = "\ufdd0"
_NEVER = "(?!)"  # a pattern without match

# A system text may set the mode of SmolLM3 by one of these, which its template takes out.
_FLAGS = re.compile(r"/(?:no_)?think|/system_override")

# The pre-tokenizers of GGUF's `tokenizer.ggml.pre`: what llama.cpp hard-codes, in the terms of `tokenizers`. Where its
# regular expressions are adapted to what its engine can do, those of the models' own files are taken.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_by(regex: str) -> list[dict]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTE_LEVEL, "use_regex": False}]


class _GgufPre(NamedTuple):
    steps: list[dict]
    ignore_merges: bool
    add_bos: bool  # where the file does not say


_DIGITS = {"type": "Digits", "individual_digits": True}
_GGUF_PRE = {
    "gpt-2": _GgufPre([_BYTE_LEVEL], ignore_merges=False, add_bos=False),
    "smollm": _GgufPre([_DIGITS, _BYTE_LEVEL], ignore_merges=False, add_bos=False),
    # llama.cpp's three names of one pre-tokenizer.
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3"), _GgufPre(_split_by(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
    ),
    # Qwen2, Qwen2.5 and Qwen3; R1's distills of them.
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen"), _GgufPre(_split_by(_QWEN2_SPLIT), ignore_merges=False, add_bos=False)
    ),
    "tekken": _GgufPre(_split_by(_TEKKEN_SPLIT), ignore_merges=True, add_bos=True),
}
# Texts of control tokens that end a reply whatever a file says: a GGUF file names one `eos` only, and Llama-3-Instruct
# has three. As in llama.cpp, and of folders too, so that one vocabulary stops at the same tokens in either format.
_ENDS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "<｜end▁of▁sentence｜>",
    )
)


def starts_with(bos: str, bos_id: int) -> dict[str, Any]:
    """Post-processor of a `tokenizer.json` by which other libraries start every sequence with BOS."""
    first: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    single, second = [first, {"Sequence": {"id": "A", "type_id": 0}}], {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, second], "special_tokens": tokens}


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant turns for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it as an instance attribute)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Tokenizer:
    """A BPE tokenizer.

    Attributes:
        name: where it was read from, for messages.
        bos_id: id of the token that every sequence of this model starts with, None if the model has none. SmolLM2
            names a BOS token but its sequences do not start with it: None.
        stop_ids: ids that end a reply, ascending.
        eos_id: the one of them that ends this model's own sequences, `eos_token`; None if it has none.
        pad_id: id to fill padded positions with. It may be equal to a stop id: never rebuild a mask from it.
        vocab_size: largest id + 1. The model's embedding may have more rows.
        markers: text -> id of the control tokens, whatever their `special` flag.
        chat_template: Jinja source, or None.
        special_tokens: the strings that chat templates refer to, `bos_token` and the like.
        begin: what `models.prompts` puts in front of the first text of a sequence: a space where SentencePiece would
            (Llama 2, Mistral 7B), else nothing. No method here adds it but `encode_chat`.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        name: str,
        bos_id: int | None,
        stop_ids: Sequence[int],
        pad_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Build from the parsed content of a `tokenizer.json`.

        Args:
            spec: the content. Its post-processor, truncation and padding are not used: ids are built here.
            name: where it was read from, for messages.
            bos_id: id that every sequence starts with, or None.
            stop_ids: ids that end a reply.
            pad_id: id for padded positions; default the first stop id, else 0.
            chat_template: Jinja source, or None.
            special_tokens: strings for the template.

        Raises:
            ValueError: the tokenizer spells in another way than byte-level BPE or SentencePiece's, see `spelling`.
        """
        self._spelling = spelling_of(spec, name)
        self._written = {key: spec.get(key) for key in self._spelling.settings}
        # A post-processor would trim white space off the spans and add special tokens; truncation would cut silently.
        spec = {**spec, "post_processor": None, "truncation": None, "padding": None}
        spec |= self._spelling.settings
        added = spec["added_tokens"]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        # The same tokenizer with every marker flagged special, and special tokens left unmatched: ids stay the same.
        spec["added_tokens"] = [{**token, "special": _is_marker(token["content"])} for token in added]
        self._plain_backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._plain_backend.encode_special_tokens = True

        vocab = self._backend.get_vocab(with_added_tokens=True)
        # The library numbers added tokens itself where the file's ids do not fit.
        moved = [t for t in added if vocab.get(t["content"]) != t["id"]]
        if moved:
            raise ValueError(f"{name}: added tokens that occur twice or leave gaps in the ids: {moved[:3]}")
        tokens = [token for token in added if _is_marker(token["content"])]
        self.name = name
        self.begin = self._spelling.begin
        self.bos_id = bos_id
        self.stop_ids = tuple(sorted(set(stop_ids)))
        self.pad_id = pad_id if pad_id is not None else next(iter(self.stop_ids), 0)
        self.vocab_size = max(vocab.values()) + 1
        self.markers = {token["content"]: vocab[token["content"]] for token in tokens}
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.eos_id = vocab.get(self.special_tokens.get("eos_token", ""), next(iter(self.stop_ids), None))
        self._marker_ids = frozenset(self.markers.values())
        self._added = {token["id"]: token["content"].encode() for token in added}  # written as they are
        tokens.sort(key=lambda token: -len(token["content"]))  # the longest match wins, as in `tokenizers`
        starts = "|".join(re.escape(token["content"]) for token in tokens)
        wholes = "|".join(map(_marker_pattern, tokens))
        self._marker_start = re.compile(f"(?={starts or _NEVER}).", re.DOTALL)
        self._marker_split = re.compile(f"({wholes or _NEVER})")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read the tokenizer of a checkpoint.

        Args:
            path: its folder or `.gguf` file, or `package:NAME/FILE`, one inside an installed Python package.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: there is no such folder or file, or it lacks a needed file.
            ValueError: the tokenizer is not handled.
        """
        found = local_path(path)
        if not found.exists():
            raise FileNotFoundError(
                f"there is no folder or file {path}; for a model of the Hugging Face hub, give what "
                "backtrack_jax.models.checkpoint.resolve returns for its id"
            )
        return cls.from_gguf(found) if found.suffix == ".gguf" else cls.from_folder(found)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read a Hugging Face folder.

        Uses `tokenizer.json`, `tokenizer_config.json` and, where present, `chat_template.jinja`, in old folders
        `special_tokens_map.json`, and the stop ids of `generation_config.json` (nothing else of it: sampling settings
        are never taken from a model folder) or, if it has none, of `config.json`.

        Args:
            folder: the folder.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: one of the two needed files is missing.
            ValueError: a file is malformed, the tokenizer's spelling is not handled, or a named special token is not in
                its vocabulary.
        """
        with named(folder, "tokenizer.json, tokenizer_config.json and stop ids as Hugging Face writes them"):
            return cls._from_folder(folder)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file describes in its metadata.

        Args:
            path: the `.gguf` file.

        Returns:
            The tokenizer, with the ids that llama.cpp gives. Rows that pad the embedding (`[PAD151665]` in files of
            Qwen) are no tokens. A GGUF file has no normalizer: Qwen's composes characters (NFC), llama.cpp does not.

        Raises:
            ValueError: the file is malformed, or a kind of tokenizer or pre-tokenizer that is not handled.
        """
        with named(path, "a GGUF file with a tokenizer"):
            return cls._from_gguf(path)

    @classmethod
    def _from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        folder = Path(folder)
        for needed in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / needed).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {needed}; a tokenizer folder holds both tokenizer.json and tokenizer_config.json"
                )
        spec = _read_json(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        # As transformers do, which take the model's config where there is no generation config.
        stops = (
            _optional_json(folder / f"{name}.json").get("eos_token_id") for name in ("generation_config", "config")
        )
        stop = next((ids for ids in stops if ids is not None), None)
        listed = [stop] if not isinstance(stop, list) else stop
        if stop is not None and not all(type(i) is int and i >= 0 for i in listed):
            raise ValueError(f"{folder}: eos_token_id={stop!r}, expected a token id, a list of them, or nothing")
        # And for which the map of old folders goes before a config that does not list the added tokens.
        named = config
        spec["added_tokens"] = _with_tokens_named_elsewhere(spec, config, _optional_json(folder / "added_tokens.json"))
        if "added_tokens_decoder" not in config:
            named = config | _optional_json(folder / "special_tokens_map.json")
        special = {
            key: named[key]["content"] if isinstance(named[key], dict) else named[key]
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if named.get(key) is not None
        }
        ids = {key: _id_of(spec, token, key, str(folder)) for key, token in special.items()}
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = "bos_token" in special and _post_processor_starts_with(spec, special["bos_token"])
        stop_ids = [stop] if isinstance(stop, int) else list(stop or [])
        template = folder / "chat_template.jinja"
        return cls(
            spec,
            name=str(folder),
            bos_id=ids.get("bos_token") if add_bos else None,
            stop_ids=stop_ids
            + ([ids["eos_token"]] if "eos_token" in ids else [])
            + [
                token["id"]
                for token in spec["added_tokens"]
                if token["content"] in _ENDS and token["id"] not in (ids.get("bos_token"), ids.get("unk_token"))
            ],
            pad_id=ids.get("pad_token"),
            chat_template=template.read_text("utf-8") if template.is_file() else _default_template(config),
            special_tokens=special,
        )

    @classmethod
    def _from_gguf(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        reader = GGUFReader(path)

        def read(key: str, default: Any = None) -> Any:
            field = reader.fields.get(key)
            return default if field is None else field.contents()

        model, pre = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
        if model != "gpt2" or pre not in _GGUF_PRE:
            raise ValueError(
                f"{path}: tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not handled; "
                f"accepted: model 'gpt2' with pre {' | '.join(map(repr, _GGUF_PRE))}"
            )
        steps, ignore_merges, add_bos = _GGUF_PRE[pre]
        texts: list[str] = read("tokenizer.ggml.tokens")
        kinds: list[int] = read("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(texts))
        flags = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
        # Read as what they are; were they tokens, the lens would take them as items and sampling could draw them.
        tokens = {text: i for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind != TokenType.UNUSED}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        spec = {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": text, "special": flags[TokenType(kind)], **plain}
                for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
                if kind in flags
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "vocab": tokens,
                "merges": [merge.split(" ") for merge in read("tokenizer.ggml.merges")],
                "ignore_merges": ignore_merges,
            },
        }
        keys = ("bos", "eos", "eot", "eom", "padding", "unknown")
        ids = {key: read(f"tokenizer.ggml.{key}_token_id") for key in keys}
        # What has another use is no end: SmolLM2's <|endoftext|> is its unknown token.
        ends = [
            i
            for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
            if kind == TokenType.CONTROL and text in _ENDS and i not in (ids["bos"], ids["unknown"])
        ]
        return cls(
            spec,
            name=str(path),
            bos_id=ids["bos"] if read("tokenizer.ggml.add_bos_token", add_bos) else None,
            stop_ids=[ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None] + ends,
            pad_id=ids["padding"],
            chat_template=read("tokenizer.chat_template"),
            special_tokens={f"{key}_token": texts[ids[key]] for key in ("bos", "eos") if ids[key] is not None},
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and the stop ids, as `from_folder` reads them.

        Args:
            folder: a folder that is there, usually a model's.
        """
        folder = Path(folder)
        config = {"add_bos_token": self.bos_id is not None, **self.special_tokens, "chat_template": self.chat_template}
        config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        stop = {"eos_token_id": list(self.stop_ids)}
        spec = json.loads(self._backend.to_str()) | self._written
        if self.bos_id is not None:
            spec["post_processor"] = starts_with(str(self._backend.id_to_token(self.bos_id)), self.bos_id)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=2), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", "utf-8")
        (folder / "generation_config.json").write_text(json.dumps(stop) + "\n", "utf-8")

    def encode(self, text: str, *, markers: bool = True) -> list[int]:
        """Token ids of `text`; no token is added at either end.

        Args:
            text: any text.
            markers: whether marker strings in the text become marker ids (text of the model or of the experimenter)
                or stay ordinary text (text from outside).

        Returns:
            The ids.

        Raises:
            ValueError: the text is not valid Unicode; or, without markers, the vocabulary itself spells a marker.
        """
        _check_unicode(text)
        if markers:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids = self._plain_backend.encode(text, add_special_tokens=False).ids
        if not self._marker_ids.isdisjoint(ids):
            found = next(marker for marker, i in self.markers.items() if i in ids)
            raise ValueError(f"{self.name}: plain text gives the marker id of {found!r}; take it out of the text")
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of `text` with the characters that each of them holds.

        Args:
            text: any text; marker strings become marker ids.

        Returns:
            The ids, and one half-open span (first character, last character + 1) of `text` per id, white space
            included. A token that holds only part of a character's bytes has that character in its span.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        _check_unicode(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        # Where a normalizer composes characters, a mark goes with the letter in front of it, whose token it is part of.
        next_starts = [start for start, _ in encoding.offsets[1:]] + [len(text)]
        offsets = zip(encoding.offsets, next_starts, strict=False)
        return encoding.ids, [(start, max(stop, following)) for (start, stop), following in offsets]

    def decode(self, ids: Sequence[int], *, skip_markers: bool = False) -> str:
        """Text of `ids`.

        Args:
            ids: token ids. Ids of the model that have no token (rows that pad an embedding) give no text.
            skip_markers: leave out all markers. (The `skip_special_tokens` of other libraries leaves R1's `<think>`
                and turn tokens in the text.)

        Returns:
            The text; bytes that are not valid UTF-8 become U+FFFD.
        """
        kept = (i for i in ids if not (skip_markers and i in self._marker_ids))
        return b"".join(map(self._bytes_of, kept)).decode("utf-8", "replace")

    def decode_with_spans(self, ids: Sequence[int]) -> tuple[str, list[Span]]:
        """Text of `ids`, as `decode` gives it, with the characters that each id holds.

        Args:
            ids: token ids.

        Returns:
            The text, and one half-open span per id, as in `encode_with_spans`. An id without text has an empty span.
        """
        pieces = [self._bytes_of(i) for i in ids]
        data = b"".join(pieces)
        chars = np.cumsum([0, *_char_widths(data)])  # chars[k]: first byte of character k
        bytes_ = np.cumsum([0, *map(len, pieces)])
        starts = np.searchsorted(chars, bytes_[:-1], side="right") - 1
        stops = np.where(bytes_[1:] > bytes_[:-1], np.searchsorted(chars, bytes_[1:]), starts)
        return data.decode("utf-8", "replace"), list(zip(starts.tolist(), stops.tolist(), strict=True))

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of a conversation under the chat template, up to where the reply begins.

        Markers that the template writes become ids; markers quoted in a message stay text. Between two markers, the
        words of the template and of the message are tokenised together, as the model saw them in training. A template
        that loops over the parts of a message gets each text as its one part. The text of every message must occur in
        what is rendered: a template that drops or changes it is refused. Limits: the template gets no tools or
        documents, and one that builds a marker out of pieces of a message is not caught.

        Args:
            messages: dicts with `role` and `content`.
            arguments: what the template reads besides them, such as `{"enable_thinking": False}` for Qwen3 and
                SmolLM3. `strftime_now` is the date that a template asks for by this name: the same one on every day.

        Returns:
            The ids, with a BOS only if the template writes one.

        Raises:
            ValueError: there is no template, it fails or refuses the messages, loses one, or does not read one of the
                arguments; or a message is not text or holds U+FDD0.
        """
        for message in messages or [None]:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError(f"messages={messages!r}, expected dicts with the texts `role` and `content`")
        if self.chat_template is None:
            raise ValueError(f"{self.name} has no chat template; use the prompt format 'plain' or 'r1'")
        for message in messages:
            if _SHIELD in message["content"]:
                raise ValueError(f"the {message['role']} message holds the noncharacter U+FDD0, which no text may hold")
        shielded = [
            {**message, "content": self._marker_start.sub(lambda match: match[0] + _SHIELD, message["content"])}
            for message in messages
        ]
        text = self._render(shielded, arguments or {})
        ids: list[int] = []
        for i, piece in enumerate(self._marker_split.split(text)):
            if i % 2:  # a marker, with the white space that its lstrip and rstrip flags take in
                ids.append(self.markers[piece if piece in self.markers else piece.strip()])
            elif piece := piece.replace(_SHIELD, ""):
                begin = self.begin if i == 0 or self._spelling.after_markers else ""
                ids += self.encode(begin + piece, markers=False)
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> str:
        """The text of a conversation, which holds that of every message."""
        assert self.chat_template is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        given: dict[str, Any] = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        given |= self.special_tokens
        try:
            read = jinja2.meta.find_undeclared_variables(environment.parse(self.chat_template)) - given.keys()
            template = environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.name} failed: {error}") from error
        if unread := sorted(arguments.keys() - read):
            accepted = ", ".join(sorted(read - {"raise_exception"})) or "none"
            raise ValueError(f"the chat template of {self.name} reads no {unread[0]!r}; arguments it reads: {accepted}")
        if date := arguments.get("strftime_now"):
            arguments = {**arguments, "strftime_now": lambda form: date}
        faults = []
        for parts in (False, True):
            given["messages"] = messages
            if parts:
                given["messages"] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
            try:
                text = template.render({**given, **arguments})
            except (jinja2.TemplateError, TypeError) as error:
                hint = ""
                if "'strftime_now' is undefined" in str(error):
                    hint = """; give its date as a template argument, such as {"strftime_now": "30 June 2025"}"""
                faults.append(f"the chat template of {self.name} failed: {error}{hint}")
                continue
            lost = [m for m in messages if m["content"].strip() not in text and self._without_flags(m) not in text]
            if not lost and not (parts and str(given["messages"][0]["content"]) in text):
                return text
            faults += [
                f"the chat template of {self.name} drops or changes a message of role {m['role']!r}, which "
                f"begins {m['content'][:40]!r}"
                for m in lost
            ]
        raise ValueError(faults[0])

    def _without_flags(self, message: Mapping[str, str]) -> str:
        """A message without the flags in a system text that the template acts on and takes out."""
        if message["role"] != "system":
            return message["content"]
        known = self.chat_template or ""
        return _FLAGS.sub(lambda flag: "" if flag[0] in known else flag[0], message["content"]).strip()

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        return self._added.get(token_id) or self._spelling.bytes_of(token)


def _is_marker(content: str) -> bool:
    return len(content.strip()) > 1


def _marker_pattern(token: Mapping[str, Any]) -> str:
    left, right = (r"\s*" if token[flag] else "" for flag in ("lstrip", "rstrip"))
    return left + re.escape(token["content"]) + right


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or cut off: {error}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _id_of(spec: Mapping[str, Any], token: str, key: str, name: str) -> int:
    for added in spec["added_tokens"]:
        if added["content"] == token:
            return added["id"]
    if token not in spec["model"]["vocab"]:
        raise ValueError(f"{name}: {key} {token!r} is not in the vocabulary of tokenizer.json")
    return spec["model"]["vocab"][token]


def _with_tokens_named_elsewhere(
    spec: Mapping[str, Any], config: Mapping[str, Any], texts: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Added tokens of `tokenizer.json`, and those that the config or `added_tokens.json` alone names, by id."""
    found = list(spec["added_tokens"])
    known = {token["content"] for token in found}
    plain = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    others = [plain | token | {"id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]
    others += [plain | {"content": text, "id": i} for text, i in texts.items()]
    for token in sorted(others, key=lambda token: token["id"]):
        if token["content"] not in known:
            known.add(token["content"])
            found.append({name: token[name] for name in ("id", "content", *plain)})
    return sorted(found, key=lambda token: token["id"])


def _post_processor_starts_with(spec: Mapping[str, Any], token: str) -> bool:
    outer = spec.get("post_processor") or {}
    templates = [p for p in [outer, *outer.get("processors", [])] if p.get("type") == "TemplateProcessing"]
    return any(p["single"][0].get("SpecialToken", {}).get("id") == token for p in templates)


def _default_template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template


def _char_widths(data: bytes) -> list[int]:
    """Bytes of each character of `data.decode("utf-8", "replace")`."""
    widths: list[int] = []
    while data:
        try:
            valid, bad = data.decode(), 0
        except UnicodeDecodeError as error:
            valid, bad = data[: error.start].decode(), error.end - error.start
        sizes = [len(char.encode()) for char in valid]
        widths += [*sizes, bad] if bad else sizes
        data = data[sum(sizes) + bad :]
    return widths


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` with the arguments that it has in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_unicode(text: str) -> None:
    """ValueError if a text holds half of a surrogate pair, as badly cut JSON does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is {text[error.start]!a}, half of a surrogate pair; expected Unicode text"
        ) from None
