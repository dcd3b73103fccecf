"""A population: many users' adapters and optimizers on one leading axis, trained in one compiled step."""
