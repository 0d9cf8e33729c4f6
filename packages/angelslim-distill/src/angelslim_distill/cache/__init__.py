"""A teacher's distributions written ahead, so that a student is trained without the teacher."""
