"""Programs: a language model, a prompt, a unit of generation and evidence, as one state-space model."""
