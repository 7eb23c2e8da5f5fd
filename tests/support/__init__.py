"""What several test modules share: models, the contract, files of others."""
