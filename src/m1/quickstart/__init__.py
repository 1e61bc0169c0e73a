"""The quickstart: the whole way from a small Transformer to voted answers, in minutes, with a report."""
