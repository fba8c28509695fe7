"""From prompts to text: chat templates, decoding of a whole population, shared beginnings."""
