"""`mlm-mpi evaluate RUN`: held-out quality of a trained model. Needs no MPI."""

import argparse

import msgspec

from mlm_mpi.tasks import language_model as lm


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi evaluate`."""
    parser.add_argument("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    parser.add_argument("--data", metavar="DIR", help="another prepared corpus with the same tokenizer")
    parser.add_argument("--baselines", action="store_true", help="also unigram tokens and xz on the same text")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    trained = lm.load(args.run, args.device)
    catalog = lm.open_corpus(trained, args.data)
    quality = lm.evaluate(trained, catalog)
    numbers = {
        "step": trained.step, "loss": quality.loss, "perplexity": quality.perplexity,
        "bits_per_character": quality.bits_per_character, "tokens": quality.tokens, "characters": quality.characters,
        "catalog": catalog.digest, "trained_on": trained.manifest.catalog,
    }  # fmt: skip
    if args.baselines:
        tokenizer = trained.tokenizer
        numbers["unigram_bits_per_character"] = lm.unigram_bits_per_character(catalog, tokenizer.vocab_size)
        alone, after = lm.xz_bits_per_character(catalog, tokenizer)
        numbers |= {"xz_bits_per_character": alone, "xz_after_training_bits_per_character": after}
    if args.json:
        print(msgspec.json.encode(numbers).decode())
        return 0
    size = f"{quality.tokens:,} tokens, {quality.characters:,} characters"
    print(f"held-out text       {size}; checkpoint of step {trained.step}")
    print(f"loss                {quality.loss:.4f} nats per token, perplexity {quality.perplexity:.2f}")
    print(f"bits per character  {quality.bits_per_character:.3f}")
    if args.baselines:
        print(f"  unigram tokens    {numbers['unigram_bits_per_character']:.3f}")
        print(f"  xz -9e            {alone:.3f}; {after:.3f} with the training text in its window")
    return 0
