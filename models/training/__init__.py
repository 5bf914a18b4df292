"""Training of the bundled models, `ldm train`; never imported while serving."""
