-- What objects of rare categories are taken for: the best-scored detection that covers each, by category.
-- views: matches, results
-- options: limit, below
--
-- An object is rare if its category has fewer than `below` (10) training instances, and covered by a detection with
-- IoU >= 0.5. n is the number of objects; at most `limit` (10) pairs per run. Objects that the best detection names
-- rightly have taken_for = category.
WITH covering AS (
    SELECT run, annotation_id AS object, category_id AS object_category, category_id AS named, score, rank
    FROM matches
    WHERE iou >= 0.5 AND annotation_id IS NOT NULL
    UNION ALL
    SELECT run, other_annotation_id, other_category_id, category_id, score, rank
    FROM matches
    WHERE other_iou >= 0.5 AND other_annotation_id IS NOT NULL
),
best AS (
    SELECT run, object, object_category, named
    FROM covering
    QUALIFY row_number() OVER (PARTITION BY run, object ORDER BY score DESC, rank, named) = 1
),
counted AS (
    SELECT
        b.run,
        o.name AS category,
        o.instance_count AS category_instances,
        t.name AS taken_for,
        t.instance_count AS taken_for_instances,
        count(*) AS n
    FROM best AS b
    JOIN results AS o ON o.run = b.run AND o.category_id = b.object_category
    JOIN results AS t ON t.run = b.run AND t.category_id = b.named
    WHERE o.instance_count < coalesce(getvariable('below')::BIGINT, 10)
    GROUP BY ALL
)
SELECT *
FROM counted
QUALIFY row_number() OVER (PARTITION BY run ORDER BY n DESC, category, taken_for)
    <= coalesce(getvariable('limit')::BIGINT, 10)
ORDER BY run, n DESC, category, taken_for;
