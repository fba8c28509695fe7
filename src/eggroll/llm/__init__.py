"""Language models: data, chat templates, rewards, models, and the trainer that ties them together."""
