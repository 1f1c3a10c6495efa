"""Small models, data sets and loaders to learn, test and demonstrate on. Floor 5."""
