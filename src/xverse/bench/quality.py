"""``xverse bench quality``: what quantising costs a model, by KL divergence, perplexity and first choices.

With ``--peers`` llama.cpp's types of the same weights are read in the same way: the same token ids, the same
float32 reference, the same figures, bits per weight of everything stored. Each engine computes as it does in
use, with rounded activations.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.bench.options import add_threads, positive
from xverse.bench.report import Row, count_threads, show
from xverse.config import UserError, choose
from xverse.hardware import cores, using_threads
from xverse.values import add_model, flags, refuse_unused

if TYPE_CHECKING:
    from torch import Tensor

    from xverse.formats import ModelDirectory
    from xverse.model import XverseConfig, XverseForCausalLM
    from xverse.quant.parity import ParityReport
    from xverse.quant.settings import QuantSettings
    from xverse.tokenizer import Tokenizer

LENGTH = 256  # tokens per row
OURS = tuple(f"int{bits}{how}" for how in ("", "-loading") for bits in (4, 3, 2, 8))
PEERS = ("Q4_0", "IQ4_XS", "Q4_K_M", "Q3_K_M", "IQ3_S", "Q2_K", "Q8_0")  # types of llama.cpp
_HIDDEN_ROWS = 8
_OF_PEERS = {"imatrix": "both", "work_dir": None}  # flags that belong to --peers, with their defaults


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = flags(parser)
    text = "text sets: files (.txt, .jsonl, token shards) or folders of them (default: a built-in text)"
    add("--texts", text, nargs="+", default=[], metavar="NAME=PATH,…")
    add("--tokens", "tokens of each text set", type=positive, default=8192, metavar="N")
    text = (
        f"{', '.join(OURS)}: as xverse quantize writes it, or as --quantize makes it while loading; "
        "bpw=X: xverse quantize --bpw X (default: int4 int8)"
    )
    add("--ours", text, nargs="+", default=["int4", "int8"], metavar="KIND")
    text = f"llama.cpp's types of the same weights (without a name: {' '.join(PEERS)}); needs the extra bench"
    add("--peers", text, nargs="*", metavar="TYPE")
    text = (
        "peers with and without an importance matrix of the package's calibration text (default: %(default)s)"
    )
    add("--imatrix", text, choices=["both", "with", "without"])
    add("--work-dir", "for the peers' files (default: a temporary folder)", metavar="DIR")
    parser.set_defaults(**_OF_PEERS)
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for wrong arguments, a model or text that cannot be read, and a missing package."""
    from xverse.formats import ModelDirectory

    peers = (
        None
        if args.peers is None
        else [choose("peers", name.upper(), {kind: kind for kind in PEERS}) for name in args.peers or PEERS]
    )
    if peers is None:
        refuse_unused(args, "--peers", **_OF_PEERS)
    else:
        from xverse.bench import llama_cpp

        llama_cpp.package()
    if args.work_dir is not None and not Path(args.work_dir).is_dir():
        raise UserError(f"--work-dir: {args.work_dir} is not a folder")
    directory = ModelDirectory.named(args.model)
    if directory.scheme is not None:
        raise UserError(f"{args.model}: is already quantised; quality is measured from the unquantised model")
    kinds = [_kind(name, directory.config) for name in args.ours]
    threads = args.threads or cores().usable
    with using_threads(threads):
        study = Study(directory, read_texts(directory.tokenizer, args.texts, args.tokens))
        results = [result for kind in kinds for result in study.ours(kind)]
        if peers is not None:
            with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
                results += study.peers(peers, args.imatrix, Path(folder))
    title = f"Quality of quantised {args.model}, {count_threads(threads)}; kernels {study.kernels}"
    show(title, [result.row() for result in results])
    return {
        "bench": "quality",
        "model": args.model,
        "kernels": study.kernels,
        "tokens": {name: reference.tokens.numel() for name, reference in study.references.items()},
        "results": [result.to_json() for result in results],
    }


@dataclass(frozen=True)
class Result:
    """One kind on one text. ``bits``: per weight of everything stored but the embedding, whose
    ``embedding_bits`` count apart (None: it is also the head)."""

    name: str
    imatrix: bool
    text: str
    bits: float
    embedding_bits: float | None
    figures: ParityReport

    def row(self) -> Row:
        figures = self.figures
        matrix = " with an importance matrix" if self.imatrix else ""
        apart = "" if self.embedding_bits is None else f", embedding {self.embedding_bits:.2f}"
        return Row(
            f"{self.name}{matrix}, {self.text}",
            f"KL {figures.kl:.5f}, perplexity {figures.delta_perplexity:+.2%} ± {figures.noise or 0:.2%}, "
            f"same first choice {figures.top1:.1%}",
            f"{self.bits:.3f} bits{apart}",
        )

    def to_json(self) -> dict[str, Any]:
        figures = self.figures
        return {
            "name": self.name,
            "imatrix": self.imatrix,
            "text": self.text,
            "bits_per_weight": round(self.bits, 4),
            "embedding_bits": self.embedding_bits,
            "kl": figures.kl,
            "perplexity_source": figures.perplexity_source,
            "delta_perplexity": figures.delta_perplexity,
            "noise": figures.noise,
            "top1": figures.top1,
        }


class Study:
    """A model in float32 and its logits on texts, the reference of the quantised ones."""

    def __init__(self, directory: ModelDirectory, texts: dict[str, Tensor]) -> None:
        import torch

        from xverse.formats import load_model
        from xverse.kernels.native import kernel_name
        from xverse.quant.text import default_calibration

        self.directory = directory
        self.calibration = default_calibration(directory.tokenizer, directory.config.num_parameters())
        self.kernels = kernel_name()
        self.model = load_model(directory, torch.float32)
        self.references = {name: Reference(self.model, rows) for name, rows in texts.items()}

    def ours(self, kind: Kind) -> Iterator[Result]:
        """The results of one kind of this project's on every text."""
        import torch

        from xverse.formats.quantize import build, mixed_formats, quantized_tensors
        from xverse.kernels.weight import QuantizedWeight
        from xverse.quant.text import loading_calibration

        calibration, settings = self.calibration, kind.settings
        if kind.loading:
            calibration = loading_calibration(self.directory.tokenizer)
        if kind.bits is not None:
            formats = mixed_formats(self.directory, kind.bits, calibration, settings)
            settings = dataclasses.replace(settings, formats=formats)
        sizes: dict[str, tuple[int, int]] = {}

        def counted() -> Iterator[tuple[str, Any]]:
            for name, tensor in quantized_tensors(self.directory, settings, calibration):
                if isinstance(tensor, QuantizedWeight):
                    sizes[name] = (tensor.stored_bytes, tensor.q.numel())
                else:
                    sizes[name] = (tensor.numel() * tensor.itemsize, tensor.numel())
                yield name, tensor

        model = build(self.model.config, counted(), torch.float32)
        bits, embedding = bits_per_weight(sizes, "model.embed_tokens.weight", "lm_head.weight")
        for text, reference in self.references.items():
            yield Result(kind.name, False, text, bits, embedding, reference.compare(model))

    def peers(self, names: Sequence[str], imatrix: str, folder: Path) -> Iterator[Result]:
        """The results of llama.cpp's types, with and without an importance matrix."""
        from xverse.bench import llama_cpp
        from xverse.log import notice

        module = llama_cpp.package()
        source, target = folder / "source.gguf", folder / "quantised.gguf"
        llama_cpp.write_source(self.directory, self.model, source)
        importance = None
        if imatrix != "without":
            importance = llama_cpp.importance_matrix(self.model, self.calibration)
        for name in names:
            for weighted in (False, True):
                if imatrix == ("without" if weighted else "with") or (
                    weighted and name in llama_cpp.UNWEIGHTED
                ):
                    continue
                notice(f"peers: {name}{' with an importance matrix' if weighted else ''}")
                llama_cpp.quantise(module, source, target, name, importance if weighted else None)
                bits, embedding = bits_per_weight(
                    llama_cpp.sizes(target), "token_embd.weight", "output.weight"
                )
                scorer = llama_cpp.Scorer(module, target, LENGTH)
                for text, reference in self.references.items():
                    figures = reference.compare_logits(scorer.logits)
                    yield Result(name, weighted, text, bits, embedding, figures)
                scorer.close()
                target.unlink()


def bits_per_weight(
    sizes: dict[str, tuple[int, int]], embedding: str, head: str
) -> tuple[float, float | None]:
    """Bits per weight of all tensors but the embedding, and of the embedding; from bytes and weights by name.
    An embedding that is also the head counts as the head."""
    apart = sizes[embedding] if head in sizes else (0, 0)
    total = [sum(column) - of for column, of in zip(zip(*sizes.values(), strict=True), apart, strict=True)]
    return 8 * total[0] / total[1], 8 * apart[0] / apart[1] if apart[1] else None


class Reference:
    """A model's last hidden states on rows of tokens, from which its logits are recomputed."""

    def __init__(self, model: XverseForCausalLM, tokens: Tensor) -> None:
        import torch

        self.tokens, self._head = tokens, model.lm_head.weight
        with torch.no_grad():
            self._hidden = torch.cat([last_hidden(model, rows) for rows in tokens.split(_HIDDEN_ROWS)])

    def compare(self, model: XverseForCausalLM) -> ParityReport:
        """The figures of another model of the same vocabulary."""
        import torch

        return self.compare_logits(lambda row: model.lm_head(last_hidden(model, torch.tensor([row]))))

    def compare_logits(self, logits: Callable[[Sequence[int]], Tensor]) -> ParityReport:
        """The figures of a function from a row of T tokens to logits [T, V]."""
        import torch

        from xverse.quant.parity import LogitFigures, next_tokens

        figures = LogitFigures()
        targets = next_tokens(self.tokens)
        length = self.tokens.shape[1]
        with torch.no_grad():
            for index, row in enumerate(self.tokens.tolist()):
                reference = self._hidden[index * length : (index + 1) * length] @ self._head.T
                figures.add(reference, logits(row), targets[index])
        return figures.report()


def last_hidden(model: XverseForCausalLM, rows: Tensor) -> Tensor:
    """Hidden states after the last norm, float32 [n·T, D], of ``rows`` int64 [n, T]."""
    from xverse.model import FullCausal

    return model.model(rows, FullCausal(*rows.shape)).flatten(0, 1)


@dataclass(frozen=True)
class Kind:
    """One of this project's kinds: settings of ``xverse quantize``, with ``bits`` of ``--bpw bits``; or those
    of ``--quantize`` while loading."""

    name: str
    settings: QuantSettings
    loading: bool = False
    bits: float | None = None


def _kind(name: str, config: XverseConfig) -> Kind:
    from xverse.formats.quantize import quick_settings
    from xverse.quant.mixing import parse_bits
    from xverse.quant.settings import default_settings

    if name.startswith("bpw="):
        return Kind(name, default_settings(4), bits=parse_bits(name.removeprefix("bpw=")))
    choose("ours", name, {kind: kind for kind in OURS})
    if name.endswith("loading"):
        settings = dataclasses.replace(quick_settings(name.partition("-")[0], config), table=True)
        return Kind(name, settings, loading=True)
    return Kind(name, default_settings(int(name[3])))


def read_texts(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Text sets as rows int64 [n, 256] by name; each is ``NAME=PATH,PATH…``. None: the package's own text."""
    if not texts:
        from xverse.quant.text import parity_tokens

        rows = parity_tokens(tokenizer, 0)
        count = min(rows.numel(), tokens) // LENGTH
        return {"built-in text": rows.flatten()[: count * LENGTH].view(count, LENGTH)}
    sets = {}
    for text in texts:
        name, separator, paths = text.partition("=")
        if not separator or not name or not paths:
            raise UserError(f"'{text}': write NAME=PATH or NAME=PATH,PATH")
        sets[name] = read_rows(tokenizer, paths, tokens)
    return sets


def read_rows(tokenizer: Tokenizer, paths: str, tokens: int) -> Tensor:
    """About ``tokens`` tokens as rows int64 [n, 256], equally many from each part; short parts give fewer. A
    part that is named again continues where it stopped.

    Raises UserError for a path that is missing, has too little text, or holds tokens of another tokenizer.
    """
    import torch

    parts = [part for path in paths.split(",") for part in _parts(Path(path))]
    rows = max(1, tokens // LENGTH // len(parts))
    blocks = []
    taken: Counter[Path] = Counter()
    for part in parts:
        ids = _ids(tokenizer, part, taken[part], taken[part] + rows * LENGTH)
        taken[part] += rows * LENGTH
        count = len(ids) // LENGTH
        if count:
            blocks.append(torch.tensor(ids[: count * LENGTH]).view(count, LENGTH))
    if not blocks:
        raise UserError(f"{paths}: no part has {LENGTH} tokens")
    return torch.cat(blocks)


def _parts(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file() or (path / "header.json").exists():
        return [path]
    parts = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if not parts:
        raise UserError(f"{path}: is empty")
    return parts


def _ids(tokenizer: Tokenizer, path: Path, start: int, stop: int) -> list[int]:
    """Tokens ``start`` to ``stop`` of a file or shard."""
    from xverse.data.shards import Shard
    from xverse.texts import load_texts

    if path.is_file():
        ids: list[int] = []
        for text in load_texts(path):
            ids += tokenizer.encode(text)
            if len(ids) >= stop:
                break
        return ids[start:stop]
    shard = Shard.open(path)
    if shard.header.tokenizer != tokenizer.hash:
        raise UserError(f"{path}: its tokens come from another tokenizer than the model's")
    return shard.tokens[start:stop].tolist()
