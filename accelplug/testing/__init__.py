"""What tests of a patch need: tiny models to try it on."""
