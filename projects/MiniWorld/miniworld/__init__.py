"""The miniature world: scenes of striped red stars and the like, drawn, annotated and captioned."""
